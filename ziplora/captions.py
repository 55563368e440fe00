"""Plain captions that Custom Diffusion leaves alone, if a manifest gives none: everyday things, doings and places, each
put together from lists in a fixed order. No concept is trained on them, and no two begin alike for long."""

OPENINGS = ("a photo of", "a painting of", "a picture with", "a close view of", "a drawing of")
THINGS = (
    "a red bicycle", "an old fisherman", "two children", "a bowl of fruit", "a sleeping dog", "a wooden boat",
    "a crowd of people", "a yellow tram", "a black cat", "an empty chair", "a stone bridge", "a young woman",
    "a flock of birds", "a white horse", "a cup of coffee", "a stack of books", "a small house", "a man with a hat",
    "a bunch of flowers", "a grey elephant", "a silver car", "a baker", "a tall tree", "a glass bottle",
    "a pair of shoes", "a baseball player", "a large truck", "a plate of food", "a brown bear", "a computer screen",
    "a kite", "an umbrella", "a church tower", "a surfer", "a group of cows", "a clock", "a train", "a green bench",
    "a violin", "a lamp", "a street sign", "a piece of cake", "a fire engine", "a teapot", "a mountain goat",
    "a candle", "a soldier",
)  # fmt: skip
DOINGS = (
    "standing still", "seen from above", "covered with snow", "next to a window", "during a storm", "waiting quietly",
    "in bright sunlight", "behind a fence", "painted blue", "between two walls", "at the end of the day", "in motion",
    "half in shadow", "in front of a wall", "surrounded by leaves", "under a clear sky", "reflected in water",
    "far away", "on a wet morning", "lit by a lantern", "with a long shadow", "in black and white", "near the ground",
    "shown from behind", "against the light", "in soft colours", "after the rain", "among tall grass", "tied to a post",
    "in thick fog", "wrapped in paper", "below a balcony", "made of wood",
)  # fmt: skip
PLACES = (
    "on a quiet street", "by the sea", "in a crowded market", "on the kitchen table", "at the airport", "in the desert",
    "inside a library", "beside a river", "on a mountain road", "in an old factory", "at a train station",
    "in the garden", "on a beach in summer", "under a bridge", "in a school yard", "on top of a hill", "in the forest",
    "near a lighthouse", "in a small village", "on a football field", "at the museum", "in the bathroom",
    "by a swimming pool", "in a narrow alley", "on the roof of a house", "in a harbour at night", "along a canal",
    "at a farm", "in front of a castle", "on a frozen lake", "in a hospital room", "at the edge of a town",
    "in a wheat field", "on a busy crossing", "inside a tent", "at a wedding", "in an empty theatre",
)  # fmt: skip
COUNT = 600


def builtin_captions() -> tuple[str, ...]:
    """COUNT captions. The lists' lengths have no common divisor, so that they run through each other."""

    def caption(number: int) -> str:
        parts = (OPENINGS, THINGS, DOINGS, PLACES)
        return " ".join(words[number % len(words)] for words in parts)

    return tuple(map(caption, range(COUNT)))
