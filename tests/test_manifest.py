"""Manifests: what a file means, and the exact message for everything that can be wrong with one."""
# ruff: noqa: E501

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from service.errors import ManifestError
from service.manifest import parse_manifest, read_manifest
from service.manifest_file import SamplesSection, SchedulerName, TrainingSection
from service.manifest_schema import manifest_schema
from ziplora.methods import METHODS
from ziplora.train_settings import TrainSettings

SMALL = """\
base: ./sdxl
subjects:
  dog: {lora: dog.safetensors, prompt: a photo of sks dog, trigger: sks dog}
  cat: {lora: s3://loras/cat.safetensors, prompt: a photo of sks cat, weight: 0.8}
styles:
  ink: {lora: ../ink.safetensors, prompt: a cat in szn style}
  oil: {lora: /srv/oil.safetensors, prompt: oil painting}
output: ./catalog
"""
DIRECTORY = "/home/me/here"


def parse(text: str | bytes, directory: str = DIRECTORY):
    raw = text.encode() if isinstance(text, str) else text
    return parse_manifest(raw, name="demo.yaml", directory=directory)


def problems(text: str | bytes, directory: str = DIRECTORY) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse(text, directory)
    return str(caught.value).splitlines()


# What a file means


def test_small_manifest():
    manifest = parse(SMALL)
    assert manifest.base == f"{DIRECTORY}/sdxl"
    assert manifest.output == f"{DIRECTORY}/catalog"
    dog, cat = manifest.subjects
    assert (dog.id, dog.role, dog.lora, dog.trigger, dog.images, dog.weight) == (
        "dog",
        "subject",
        f"{DIRECTORY}/dog.safetensors",
        "sks dog",
        (),
        1.0,
    )
    assert (cat.lora, cat.trigger, cat.weight) == ("s3://loras/cat.safetensors", None, 0.8)
    assert [style.lora for style in manifest.styles] == ["/home/me/ink.safetensors", "/srv/oil.safetensors"]
    assert manifest.pairs == (("dog", "ink"), ("dog", "oil"), ("cat", "ink"), ("cat", "oil"))
    assert manifest.where("subjects", "cat", "lora") == "demo.yaml:4: subjects.cat.lora"
    assert manifest.where("samples", "size") == "demo.yaml:1: samples.size"


def test_defaults_are_stated():
    manifest = parse(SMALL)
    (merge,) = manifest.merges
    assert (merge.method, merge.seeds, merge.knobs["steps"], merge.given) == ("ziplora", (0,), 100, frozenset())
    assert [(prompt.name, prompt.template) for prompt in manifest.samples.prompts] == [
        ("subject-in-style", "{subject} in {style}")
    ]
    assert manifest.defaulted == (
        "merge: not given, so ziplora with seed 0",
        "merge: ziplora with "
        + ", ".join(f"{knob} {'none' if value is None else value}" for knob, value in merge.knobs.items()),
        "samples: not given, so one image of '{subject} in {style}', seed 0, 50 steps",
        "subjects: weight 1.0 for 1 of 2",
        "styles: weight 1.0 for 2 of 2",
    )


def test_every_knob_given_leaves_nothing_to_state():
    text = SMALL.replace("}\n", ", weight: 1}\n").replace("weight: 0.8, weight: 1", "weight: 0.8")
    text += "merge: direct\nsamples: {prompts: x, seeds: 1, steps: 2, style_strengths: 1}\n"
    assert parse(text).defaulted == ()


def test_merges():
    text = SMALL + "merge: [{steps: 10, learning_rate: 1e-2, seeds: [1, 2]}, direct, {method: direct, seed: 7}]\n"
    first, second, third = parse(text).merges
    assert (first.method, first.seeds, first.knobs["steps"], first.given) == (
        "ziplora",
        (1, 2),
        10,
        frozenset({"steps", "learning_rate"}),
    )
    assert json.loads(json.dumps(first.knobs)) == first.knobs
    assert (second.method, second.knobs, second.seeds, third.seeds) == ("direct", {}, (0,), (7,))


def test_samples():
    text = SMALL + (
        "samples:\n  prompts: {both: '{subject} in {style}', alone: 'a {subject}'}\n  seeds: [3, 4]\n  size: [64, 96]\n"
        "  style_strengths: [1, 0.7]\n  guidance: 7\n  scheduler: ddim\n  negative: ' blurry '\n"
    )
    samples = parse(text).samples
    assert [prompt.name for prompt in samples.prompts] == ["both", "alone"]
    assert (samples.seeds, samples.size, samples.style_strengths) == ((3, 4), (64, 96), (1.0, 0.7))
    assert (samples.guidance, samples.scheduler, samples.negative, samples.n_images) == (7.0, "ddim", "blurry", 8)


@pytest.mark.parametrize("samples", ["{}", "{prompts: []}", "{seeds: []}", "{prompts: x, seeds: []}"])
def test_merge_only(samples):
    assert parse(SMALL + f"samples: {samples}\n").samples.n_images == 0


def test_prompt_names_are_distinct():
    prompts = parse(SMALL + "samples: {prompts: ['{subject}, x', '{subject} x', '!']}\n").samples.prompts
    assert [prompt.name for prompt in prompts] == ["subject-x", "subject-x-1", "prompt"]


@pytest.mark.parametrize(
    ("pairs", "chosen"),
    [
        ("all", "dog/ink dog/oil cat/ink cat/oil"),
        ("{include: 'd*/*'}", "dog/ink dog/oil"),
        ("{include: ['d*/ink', 'cat/o?l']}", "dog/ink cat/oil"),
        ("{exclude: ['*/ink']}", "dog/oil cat/oil"),
        ("[[cat, ink], [dog, oil]]", "dog/oil cat/ink"),
    ],
)
def test_pairs(pairs, chosen):
    assert [f"{subject}/{style}" for subject, style in parse(SMALL + f"pairs: {pairs}\n").pairs] == chosen.split()


def test_patterns_of_images_expand_in_order(tmp_path):
    for name in ("b.png", "a.png", "[x].png", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    text = SMALL.replace("trigger: sks dog", "images: ['?.png', c.txt, '[x].png']")
    images = parse(text, str(tmp_path)).subjects[0].images
    assert [os.path.basename(image) for image in images] == ["a.png", "b.png", "c.txt", "[x].png"]


def test_anchors_and_merge_keys():
    text = (
        SMALL.replace("  cat: {", "  cat: {<<: *common, ")
        .replace("prompt: a photo of sks cat, weight: 0.8", "lora: x")
        .replace("lora: s3://loras/cat.safetensors, lora: x", "lora: x")
        .replace("base:", "x-common: &common {prompt: shared, weight: 0.5}\nbase:")
    )
    cat = parse(text).subjects[1]
    assert (cat.prompt, cat.weight) == ("shared", 0.5)


def test_words_that_older_yaml_takes_for_booleans():
    text = SMALL.replace("dog: {", "no: {").replace("trigger: sks dog", "trigger: on")
    subject = parse(text).subjects[0]
    assert (subject.id, subject.trigger) == ("no", "on")


def test_hub_ids_and_directories(tmp_path):
    (tmp_path / "org" / "local").mkdir(parents=True)
    for text, base in (
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("{location: org/model, revision: main}", "org/model"),
        ("org/local", f"{tmp_path}/org/local"),
        ("./org/model", f"{tmp_path}/org/model"),
        ("/models/sdxl", "/models/sdxl"),
    ):
        assert parse(SMALL.replace("./sdxl", text), str(tmp_path)).base == base


def test_a_manifest_in_object_storage_has_its_neighbours_there(swift, tmp_path):
    import boto3

    s3 = boto3.client("s3")
    text = (
        SMALL.replace("./sdxl", "org/sdxl")
        .replace("../ink", "sub/ink")
        .replace("trigger: sks dog", "images: 'd/*.png'")
    )
    for key, body in (("m/demo.yaml", text.encode()), ("m/d/2.png", b"x"), ("m/d/1.png", b"x"), ("m/d/e/3.png", b"x")):
        s3.put_object(Bucket=swift.bucket, Key=key, Body=body)
    manifest = read_manifest(f"{swift.url}/m/demo.yaml")
    assert manifest.base == "org/sdxl"
    assert manifest.output == f"{swift.url}/m/catalog"
    assert manifest.subjects[0].lora == f"{swift.url}/m/dog.safetensors"
    assert manifest.subjects[0].images == (f"{swift.url}/m/d/1.png", f"{swift.url}/m/d/2.png")
    with pytest.raises(ManifestError, match=r"none\.yaml: does not exist .*; expected a manifest, a YAML file"):
        read_manifest(f"{swift.url}/m/none.yaml")


# What is wrong with a file as such


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "demo.yaml: is empty"),
        (b"# only a comment\n", "demo.yaml: is empty"),
        (
            b"- a\n",
            "demo.yaml:1: expected a mapping of the fields base, subjects, styles, pairs, merge, samples, training, scores, outputs, output, "
            "given a list of 1",
        ),
        (b"base: \xff\n", "demo.yaml:1: is not UTF-8 (byte 0xff at offset 6); save it as UTF-8"),
        (b"base: a\nx: \x07\n", "demo.yaml:2: holds the control character '\\x07'; remove it"),
        (b"base:\n\tx: 1\n", "demo.yaml:2: a tab in the indentation; YAML takes spaces only: replace it"),
        (b"base: a\nbase: b\n", "demo.yaml:2: base: written twice, first on line 1; keep one"),
        (
            b"subjects:\n  dog: {lora: a}\n  cat: {lora: b}\n  dog: {lora: c}\n",
            "demo.yaml:4: subjects.dog: written twice, first on line 2; keep one",
        ),
        (b"a: 1\n---\nb: 1\n", "demo.yaml:2: a second document starts here; expected one: remove the --- line"),
        (b"a: &x [*x]\n", "demo.yaml:1: a[0]: refers to itself; an alias may not stand inside its own anchor"),
        (
            b"a: !!python/object:os.system x\n",
            "demo.yaml:1: a: has the tag !!python/object:os.system; tags are not read: remove it",
        ),
        (b"[" * 50, "demo.yaml:1: is nested deeper than 24 levels; is a bracket missing?"),
        (
            b"a: [1\nb: 2\n",
            "demo.yaml:2: is no YAML: did not find expected ',' or ']' (while parsing a flow sequence, begun on line 1); "
            "a missing quote, colon or bracket?",
        ),
        (b"{a: 1}: 2\n", "demo.yaml:1: a key is a list or a mapping; expected text"),
        (b" " * (16 * 2**20 + 1), "demo.yaml: is 16,777,217 bytes long; at most 16,777,216 are read"),
    ],
)
def test_unreadable_text(raw, message):
    assert problems(raw) == [message]


def test_a_billion_laughs_end_early():
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (message,) = problems("\n".join(lines))
    assert message.endswith("has more than 500,000 values once aliases are expanded")


def test_missing_file_directory_unreadable(tmp_path):
    for path, message in (
        (tmp_path / "none.yaml", "does not exist; expected a manifest, a YAML file"),
        (tmp_path, "is a directory; expected a manifest, a YAML file"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (Path("a\0b"), "cannot be read (embedded null byte)"),
    ):
        with pytest.raises(ManifestError) as caught:
            read_manifest(path)
        assert str(caught.value).startswith(f"{path}: {message}")


# What is wrong with its fields

FIELDS = "lora, prompt, trigger, images, weight, training, priority"
TRAINING = ", ".join(TrainingSection.model_fields)
LOCATION = "expected s3://bucket/key"
CASES = [
    ("output: ./catalog\n", "", "demo.yaml:1: output: missing; expected where the catalog goes: a directory or s3://bucket/prefix"),
    (
        "output:",
        "ouput:",
        "demo.yaml:1: output: missing; expected where the catalog goes: a directory or s3://bucket/prefix",
        "demo.yaml:8: ouput: unknown field; did you mean output? known: base, subjects, styles, pairs, merge, samples, training, scores, outputs, output",
    ),
    ("trigger:", "triger:", f"demo.yaml:3: subjects.dog.triger: unknown field; did you mean trigger? known: {FIELDS}"),
    ("trigger:", "zzz:", f"demo.yaml:3: subjects.dog.zzz: unknown field; known: {FIELDS}"),
    (
        "prompt: oil painting",
        "weight: heavy",
        "demo.yaml:7: styles.oil.prompt: missing; expected the prompt that the LoRA was trained with, such as 'a photo of sks dog'",
        "demo.yaml:7: styles.oil.weight: expected a number, given 'heavy'",
    ),
    ("weight: 0.8", "weight: .inf", "demo.yaml:4: subjects.cat.weight: expected a finite number, given inf"),
    ("weight: 0.8", "weight: 11", "demo.yaml:4: subjects.cat.weight: expected at most 10, given 11"),
    ("weight: 0.8", "weight: true", "demo.yaml:4: subjects.cat.weight: expected a number, given true"),
    ("oil painting", "2024", "demo.yaml:7: styles.oil.prompt: expected text, given 2024; put it in quotes"),
    ("oil painting", "", "demo.yaml:7: styles.oil.prompt: expected text, given nothing"),
    ("oil painting", '"a\\x01b"', "demo.yaml:7: styles.oil.prompt: holds the control character '\\x01'; remove it"),
    ("{lora: /srv/oil.safetensors, prompt: oil painting}", "oil.safetensors", "demo.yaml:7: styles.oil: expected a mapping of fields, given 'oil.safetensors'"),
    ("lora: dog.safetensors", "lora: [dog.safetensors]", "demo.yaml:3: subjects.dog.lora: expected text, given a list of 1"),
    ("lora: dog.safetensors, ", "", "demo.yaml:3: subjects.dog.lora: missing; expected the LoRA file: a path or s3://bucket/key, or else images, to train one on"),
    ("trigger: sks dog", "training: {steps: 5}", "demo.yaml:3: subjects.dog.training: given beside lora, which is trained already; keep one of them"),
    ("lora: dog.safetensors", "images: /dev/null, training: {step: 5}", f"demo.yaml:3: subjects.dog.training.step: unknown field; did you mean steps? known: {TRAINING}"),
    # ids
    ("dog:", "a/b:", "demo.yaml:3: subjects.a/b: the id 'a/b' cannot be used; expected 1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit"),
    ("dog:", "../dog:", "demo.yaml:3: subjects.../dog: the id '../dog' cannot be used; expected 1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit"),
    ("dog:", '"a\\nb":', "demo.yaml:3: subjects.a?b: the id 'a\\nb' cannot be used; expected 1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit"),
    ("dog:", "Cat:", "demo.yaml:4: subjects.cat: the id differs from Cat on line 3 by case alone; rename one of them"),
    ("dog:", "nul:", "demo.yaml:3: subjects.nul: the id 'nul' cannot be a file name on Windows; rename it"),
    ("dog:", "COM1.x:", "demo.yaml:3: subjects.COM1.x: the id 'COM1.x' cannot be a file name on Windows; rename it"),
    ("dog:", "dog.:", "demo.yaml:3: subjects.dog.: the id 'dog.' cannot be a file name on Windows; rename it"),
    # locations
    ("dog.safetensors", '"a\\tb"', "demo.yaml:3: subjects.dog.lora: holds the invisible or control character '\\t'; remove it"),
    ("dog.safetensors", "http://x/dog", "demo.yaml:3: subjects.dog.lora: the scheme http:// is not known; expected a path or s3://bucket/key"),
    ("s3://loras/cat", "s3://loras/../cat", "demo.yaml:4: subjects.cat.lora: s3://loras/../cat.safetensors: the key '../cat.safetensors' has an empty, '.' or '..' part: keys are relative paths such as pairs/dog/merged.png"),
    ("s3://loras/cat.safetensors", "s3://loras", f"demo.yaml:4: subjects.cat.lora: s3://loras names a bucket, not an object; {LOCATION}"),
    ("s3://loras/", "s3://Lo_ras/", f"demo.yaml:4: subjects.cat.lora: s3://Lo_ras/cat.safetensors: 'Lo_ras' is no bucket name; {LOCATION}"),
    ("output: ./catalog", "output: s3://bucket/x/../y", "demo.yaml:8: output: s3://bucket/x/../y/: the key 'x/../y' has an empty, '.' or '..' part: keys are relative paths such as pairs/dog/merged.png"),
    ("output: ./catalog", "output: ./catalog\nscores: {clip: s3://models/clip}", "demo.yaml:9: scores.clip: s3://models/clip lies in object storage; expected a local directory or a hub id: copy it first"),
    ("output: ./catalog", "output: /etc/hosts", "demo.yaml:8: output: /etc/hosts is a file; expected a directory or s3://bucket/prefix"),
    ("trigger: sks dog", "images: '/nowhere/*.png'", "demo.yaml:3: subjects.dog.images: /nowhere/*.png matches no file; expected an image, or leave images out"),
    ("trigger: sks dog", "images: [a.png, ./a.png]", "demo.yaml:3: subjects.dog.images[1]: /home/me/here/a.png is already in subjects.dog.images[0]; name each image once"),
    ("trigger: sks dog", "images: {a: b}", "demo.yaml:3: subjects.dog.images: expected a list, given a mapping (a)"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "messages"), [(old, new, list(messages)) for old, new, *messages in CASES])
def test_wrong_field(old, new, messages):
    assert old in SMALL
    assert problems(SMALL.replace(old, new, 1)) == messages


ADDED = [
    # pairs
    ("pairs: some", "pairs: expected all, {include: [subject/style patterns], exclude: […]}, or a list of [subject, style], given 'some'"),
    ("pairs: {include: ['dgo*/*']}", "pairs.include[0]: dgo*/* matches no subject; known: dog, cat"),
    ("pairs: {exclude: 'dog/olio'}", "pairs.exclude: dog/olio matches no style; known: ink, oil"),
    ("pairs: {include: dog}", "pairs.include: expected a pattern subject/style such as dog*/*, given 'dog'"),
    ("pairs: {exlude: ['*/ink']}", "pairs.exlude: unknown field; did you mean exclude? known: include, exclude"),
    ("pairs: {exclude: ['*/*']}", "pairs: no pair is left; expected at least one"),
    ("pairs: []", "pairs: no pair is left; expected at least one"),
    ("pairs: [[dog, oill]]", "pairs[0]: no style has the id 'oill'; did you mean oil? known: ink, oil"),
    ("pairs: [[dog, ink], [dog, ink]]", "pairs[1]: dog/ink is already pairs[0]; name each pair once"),
    ("pairs: [dog/ink]", "pairs[0]: expected [subject, style], given 'dog/ink'"),
    # merge
    ("merge: {method: ziplra}", f"merge.method: unknown method 'ziplra'; did you mean ziplora? known: {', '.join([*METHODS, 'best'])}"),
    ("merge: 3", "merge: expected a method or a mapping of method and knobs, given 3"),
    ("merge: []", f"merge: empty; expected a method (known: {', '.join(METHODS)}), or leave merge out"),
    ("merge: {steps: many}", "merge.steps: expected a whole number, given 'many'"),
    ("merge: {steps: 2.5}", "merge.steps: expected a whole number, given 2.5"),
    ("merge: [direct, {steps: 0}]", "merge[1]: steps is 0; at least 1"),
    ("merge: {stepz: 3}", f"merge.stepz: ziplora has no such knob; did you mean steps? known: {', '.join(METHODS['ziplora'].knob_names)}, seed"),
    ("merge: {method: direct, steps: 3}", "merge.steps: direct has no such knob; known: seed"),
    ("merge: {penalty: big}", "merge.penalty: expected one of mean, columns, literal, given 'big'"),
    ("merge: {learning_rate: .nan}", "merge.learning_rate: expected a finite number, given nan"),
    ("merge: {seed: -1}", "merge.seed: expected at least 0, given -1"),
    ("merge: {seeds: [1, x]}", "merge.seeds[1]: expected a whole number, given 'x'"),
    ("merge: {seed: [1, 1]}", "merge.seed: expected at least one seed, each once"),
    ("merge: {seed: 1, seeds: 2}", "merge.seeds: given beside seed, which means the same; keep one"),
    ("merge: [direct, {method: direct, seeds: [1, 0]}]", "merge[1]: the same as merge[0] in method, knobs and seed 0; keep one"),
    ("merge: {method: joint, rank: 0}", "merge: rank is 0; it must be at least 1"),
    ("merge: {method: styledrop, lr: 0}", "merge: lr is 0.0; a finite number above 0"),
    ("merge: {method: styledrop, base: 3}", "merge.base: expected text, given 3; put it in quotes"),
    ("merge: {method: styledrop, txt: 1}", f"merge.txt: styledrop has no such knob; did you mean text? known: {', '.join(METHODS['styledrop'].knob_names)}, seed"),
    # training
    ("training: {rnk: 4}", f"training.rnk: unknown field; did you mean rank? known: {TRAINING}"),
    ("training: {lr: 0}", "training.lr: expected more than 0, given 0"),
    ("training: 3", "training: expected a mapping of fields, given 3"),
    ("training: {lr_schedule: linear}", "training.lr_schedule: expected one of constant, cosine, given 'linear'"),
    # samples
    ("samples:", "samples: expected a mapping of fields, given nothing"),
    ("samples: {seeds: [1]}", "samples.prompts: missing; expected templates such as '{subject} in {style}', or `samples: {}` for no images"),
    ("samples: {prompts: '{subjct} in {style}'}", "samples.prompts: unknown field {subjct}: a template knows {subject} and {style}"),
    ("samples: {prompts: ['{subject', x]}", "samples.prompts[0]: unbalanced braces: write {{ and }} for literal ones"),
    ("samples: {prompts: [x, x]}", "samples.prompts[1]: the same as prompts[0]; keep one (seeds make several images)"),
    ("samples: {prompts: {a/b: x}}", "samples.prompts.a/b: the name 'a/b' cannot be used; expected 1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit"),
    ("samples: {prompts: 5}", "samples.prompts: expected templates with {subject} and {style}: a list, or a mapping of name: template, given 5"),
    ("samples: {prompts: x, steps: 0}", "samples.steps: expected at least 1, given 0"),
    ("samples: {prompts: x, size: [1024]}", "samples.size: expected a list of at least 2, given a list of 1"),
    ("samples: {prompts: x, scheduler: eulr}", "samples.scheduler: expected one of ddim, ddpm, euler, euler-ancestral, dpm++2m, dpm++2m-karras, unipc, given 'eulr'"),
    ("samples: {prompts: x, style_strengths: [1, 3]}", "samples.style_strengths[1]: expected at most 2, given 3"),
    ("merge: {method: ties, density: 0}", "merge: density is 0.0; above 0 (nothing kept) and at most 1 (everything)"),
    ("merge: {method: np-lora, mu: -1}", "merge: mu is -1.0; at least 0 (the direct merge) and finite, or null for full projection"),
    ("merge: {method: svd, rank: 0}", "merge: rank is 0; at least 1, or null for the larger of the two LoRAs'"),
    ("merge: {method: custom-diffusion, captions: []}", "merge: captions is empty; plain captions to leave alone, or built-in"),
    ("merge: {method: custom-diffusion, others: all}", "merge.others: expected one of direct, none, given 'all'"),
    ("merge: {method: mix-of-show, steps: 0}", "merge: steps is 0; at least 1"),
    ("merge: {method: k-lora, k: 0}", "merge: k is 0; at least 1, or null for the product of both LoRAs' ranks"),
    ("outputs: [onnx]", "outputs[0]: expected one of peft, given 'onnx'"),
]  # fmt: skip


def test_no_second_layout_of_what_is_no_file():
    assert problems(f"{SMALL}merge: [direct, k-lora]\noutputs: peft\n") == [
        "demo.yaml:10: outputs: k-lora yields images and a recipe, no merged file, so there is no peft of it; leave"
        " outputs out, or merge by k-lora in a manifest of its own"
    ]


@pytest.mark.parametrize(("added", "message"), ADDED)
def test_wrong_addition(added, message):
    assert problems(f"{SMALL}{added}\n") == [f"demo.yaml:9: {message}"]


def test_a_strength_is_sampled_only_where_the_file_keeps_the_style_apart():
    samples = "samples: {prompts: x, style_strengths: [1, 0.4]}\n"
    text = "demo.yaml:10: samples.style_strengths: svd leaves the style no rows of its own, so that only 1.0 can be sampled; "
    assert problems(f"{SMALL}merge: svd\n{samples}") == [f"{text}give the styles a weight instead"]
    assert problems(f"{SMALL}merge: [direct, svd]\n{samples.replace('1, ', '')}") == [f"{text}add 1.0"]
    stated = parse(f"{SMALL}merge: [direct, svd]\n{samples}").defaulted
    assert "samples.style_strengths: 1.0 alone for svd, whose style has no rows of its own" in stated
    assert not any("alone" in line for line in parse(f"{SMALL}merge: [direct, ties, np-lora]\n{samples}").defaulted)
    parse(f"{SMALL}merge: svd\nsamples: {{prompts: x}}\n")


def test_joint_training_needs_pictures_of_both():
    text = SMALL.replace("trigger: sks dog", "images: dog.png").replace(
        "prompt: oil painting", "images: a.png, prompt: x"
    )
    why = (
        "missing; joint trains on pictures of both subject and style: give some, or leave {0} out of the pairs, or"
        " merge by joint in a manifest of its own"
    )
    assert problems(f"{text}merge: [direct, joint]\n") == [
        f"demo.yaml:4: subjects.cat.images: {why.format('cat')}",
        f"demo.yaml:6: styles.ink.images: {why.format('ink')}",
    ]
    parse(f"{text}merge: joint\npairs: [[dog, oil]]\n")
    found = problems(f"{text}merge: styledrop\n")
    assert found == [
        f"demo.yaml:4: subjects.cat.images: {why.format('cat').replace('joint', 'styledrop')}",
        f"demo.yaml:6: styles.ink.images: {why.format('ink').replace('joint', 'styledrop')}",
    ]


def test_a_base_of_the_methods_own_lies_beside_the_manifest_or_on_the_hub():
    text = SMALL.replace("trigger: sks dog", "images: dog.png").replace(
        "prompt: oil painting", "images: a.png, prompt: x"
    )

    def base(written):
        (merge,) = parse(f"{text}pairs: [[dog, oil]]\nmerge: {{method: styledrop{written}}}\n").merges
        return merge.knobs["base"]

    assert base(", base: models/amused-mini") == "models/amused-mini"  # as a hub id looks, and nothing lies there
    assert base(", base: ./amused") == "/home/me/here/amused"
    assert base(", base: s3://models/amused") == "s3://models/amused"
    assert base("") == "amused/amused-256"


def test_a_training_has_the_papers_settings_where_nothing_is_said():
    settings = {field.name: field.default for field in fields(TrainSettings) if field.name not in ("prompt", "trigger")}
    assert TrainingSection().model_dump() == settings
    text = SMALL.replace("lora: dog.safetensors", "images: dog.png, training: {steps: 600}")
    dog, _ = parse(f"{text}training: {{rank: 4, lr: 1e-3}}\n").subjects
    assert dog.lora == ""
    assert dog.training == settings | {"rank": 4, "lr": 1e-3, "steps": 600}
    assert any(
        line.startswith("training: alpha none, steps 1000, ")
        for line in parse(f"{text}training: {{rank: 4}}\n").defaulted
    )
    assert (
        "training: not looked at, as nothing is to be trained by it"
        in parse(f"{SMALL}training: {{rank: 4}}\n").defaulted
    )


def test_all_problems_at_once_in_the_order_of_the_file():
    text = SMALL.replace("weight: 0.8", "weight: x").replace("trigger:", "triger:").replace("./catalog", "")
    assert [line.split(": ")[:2] for line in problems(text + "merge: {steps: 0}\npairs: [[dog, olio]]\n")] == [
        ["demo.yaml:3", "subjects.dog.triger"],
        ["demo.yaml:4", "subjects.cat.weight"],
        ["demo.yaml:8", "output"],
        ["demo.yaml:9", "merge"],
        ["demo.yaml:10", "pairs[0]"],
    ]


def test_no_subjects():
    text = "base: x\nsubjects: {}\nstyles: {ink: {lora: a, prompt: b}}\noutput: o\n"
    assert problems(text) == ["demo.yaml:2: subjects: empty; expected at least one subject, id: {lora: …, prompt: …}"]


def test_schema_names_every_field_and_knob():
    schema = json.loads(json.dumps(manifest_schema()))
    assert set(schema["required"]) == {"base", "subjects", "styles", "output"}
    assert set(schema["$defs"]["SamplesSection"]["properties"]) == set(SamplesSection.model_fields)
    methods = {
        one["properties"]["method"]["const"]: one
        for one in schema["properties"]["merge"]["anyOf"]
        if "properties" in one
    }
    for name, method in METHODS.items():
        assert set(method.knob_names) <= set(methods[name]["properties"])


def test_scheduler_names_are_those_that_the_sampler_knows():
    from ziplora.sample import SCHEDULERS

    assert set(SchedulerName.__args__) == set(SCHEDULERS)


# The best of several


def test_best_lists_methods_with_their_knobs():
    text = SMALL + "merge: {method: best, of: [direct, {method: ziplora, steps: 7}], good_enough: 0.5, seed: 3}\n"
    (merge,) = parse(text).merges
    assert (merge.method, merge.seeds) == ("best", (3,))
    assert [one["method"] for one in merge.knobs["of"]] == ["direct", "ziplora"]
    assert merge.knobs["of"][1]["knobs"]["steps"] == 7
    assert (merge.knobs["by"], merge.knobs["good_enough"]) == ("harmonic", 0.5)
    stated = parse(text).defaulted
    assert "merge: best with by harmonic" in stated
    assert any(line.startswith("merge: ziplora with learning_rate 0.01") for line in stated)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("", "merge: best has no of; expected a list of methods, or mappings of method and knobs, the cheapest first"),
        (", of: [direct]", "merge.of: expected a list of at least 2, given a list of 1"),
        (", of: [direct, zzz]", "merge.of[1]: unknown method 'zzz'; known: "),
        (
            ", of: [direct, {method: ziplora, step: 3}]",
            "merge.of[1].step: ziplora has no such knob; did you mean steps? ",
        ),
        (", of: [direct, {method: best, of: []}]", "merge.of[1]: expected a method other than best, and no seed"),
        (", of: [direct, {method: ziplora, seed: 3}]", "merge.of[1]: expected a method other than best, and no seed"),
        (", of: [direct, direct]", "merge.of[1]: the same as merge.of[0] in method and knobs; keep one"),
        (", of: [direct, ties], by: mean", "merge.by: expected one of harmonic, style, subject, text, given 'mean'"),
        (", of: [direct, ties], good_enough: 2", "merge.good_enough: expected at most 1, given 2"),
        (", of: [direct, ties], keep: 2", "merge.keep: best has no such field; known: of, by, good_enough, seed"),
    ],
)
def test_what_can_be_wrong_with_best(fields: str, message: str):
    (problem,) = problems(f"{SMALL}merge: {{method: best{fields}}}\n")
    assert problem.startswith(f"demo.yaml:9: {message}")


def test_the_schema_knows_best():
    merges = manifest_schema()["properties"]["merge"]["anyOf"]
    (best,) = [one for one in merges if one.get("properties", {}).get("method") == {"const": "best"}]
    assert set(best["properties"]) == {"method", "seed", "seeds", "of", "by", "good_enough"}
    assert any(one.get("enum") == list(METHODS) for one in best["properties"]["of"]["items"]["anyOf"])
