"""Plans of real manifests: tiny bases, LoRAs in several layouts, images; what is counted, stated and refused."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from service.catalog import Catalog
from service.errors import ManifestError
from service.inputs import DigestCache
from service.jobs import from_json, identity, to_json
from service.lora_checks import derived_trigger
from service.manifest import read_manifest
from service.plan import Plan, plan
from service.plan_json import plan_json
from service.plan_text import summary_lines
from tests.lora_files import lora_file, random_lora, shapes_of
from tests.tiny import tiny_sd15, tiny_sdxl

MANIFEST = """\
base: ../sdxl
subjects:
  dog: {lora: dog.safetensors, prompt: a photo of sks dog, images: dog.png}
  cat: {lora: cat.safetensors, prompt: a photo of sks cat, weight: 0.5}
styles:
  ink: {lora: ink.safetensors, prompt: a cat in szn style, trigger: ink drawing}
merge: [{steps: 2, seeds: [0, 1]}, direct]
samples: {prompts: ["{subject} in {style}"], seeds: [0, 1], steps: 3}
output: ../catalog
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Bases and LoRA files, made once."""
    root = tmp_path_factory.mktemp("files")
    sdxl, sd15 = tiny_sdxl(), tiny_sd15()
    sdxl.save_pretrained(root / "sdxl")
    sd15.save_pretrained(root / "sd15")
    shapes = {path: shape for path, shape in shapes_of(sdxl).items() if "_embedding" not in path}
    targets = {path: shape for path, shape in shapes.items() if ".attn" in path}
    targets_sd15 = {path: shape for path, shape in shapes_of(sd15).items() if ".attn" in path}
    (root / "loras").mkdir()
    for name, content in {
        "dog": lora_file(random_lora(targets, 4, 0), "kohya-sgm", metadata={"modelspec.trigger_phrase": "zwx dog"}),
        "cat": lora_file(random_lora(shapes, 2, 1), "kohya-diffusers"),
        "ink": lora_file(random_lora(targets, 8, 2), "peft"),
        "sd15": lora_file(random_lora(targets_sd15, 4, 3), "kohya-sd15"),
    }.items():
        (root / f"loras/{name}.safetensors").write_bytes(content)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(root / "loras/dog.png")
    return root


@pytest.fixture
def place(files: Path, tmp_path: Path) -> Path:
    """A directory of its own with links to the files, for manifests and spoilt inputs."""
    for name in ("sdxl", "sd15"):
        (tmp_path / name).symlink_to(files / name)
    (tmp_path / "m").mkdir()
    for path in (files / "loras").iterdir():
        (tmp_path / "m" / path.name).symlink_to(path)
    return tmp_path


def planned(place: Path, text: str = MANIFEST, **kwargs) -> Plan:
    (place / "m/demo.yaml").write_text(text)
    return plan(read_manifest(place / "m/demo.yaml"), digests=DigestCache(place / "digests"), **kwargs)


def problems(place: Path, text: str) -> list[str]:
    return [line.replace(f"{place}/m/", "").replace(str(place), "…") for line in planned(place, text).problems]


def with_lora(name: str) -> str:
    return MANIFEST.replace("lora: dog.safetensors", f"lora: {name}")


def test_jobs_are_methods_by_seeds_by_pairs(place):
    found = planned(place)
    assert found.problems == ()
    assert [(job.method, job.seed, job.pair) for job in found.jobs] == [
        ("ziplora", 0, "dog/ink"),
        ("ziplora", 0, "cat/ink"),
        ("ziplora", 1, "dog/ink"),
        ("ziplora", 1, "cat/ink"),
        ("direct", 0, "dog/ink"),
        ("direct", 0, "cat/ink"),
    ]
    assert len({job.job_id for job in found.jobs}) == 6
    assert found.left == found.jobs
    found.check()


def test_priorities_of_both_add_up_and_are_no_part_of_the_identity(place):
    before = {job.job_id for job in planned(place).jobs}
    manifest = MANIFEST.replace("weight: 0.5", "weight: 0.5, priority: 3").replace(
        "ink drawing", "ink drawing, priority: 1"
    )
    made = planned(place, manifest)
    assert {(job.subject.id, job.priority) for job in made.jobs} == {("dog", 1), ("cat", 4)}
    assert {job.job_id for job in made.jobs} == before
    assert from_json(to_json(made.jobs[0])) == made.jobs[0]


def test_a_job_holds_what_the_manifest_and_the_files_say(place, files):
    job = planned(place).jobs[0]
    assert job.base.architecture == "sdxl"
    assert job.base.location == f"{place}/sdxl"
    assert (job.subject.id, job.subject.trigger, job.subject.lora) == ("dog", "zwx dog", f"{place}/m/dog.safetensors")
    assert job.subject.images[0].location == f"{place}/m/dog.png"
    assert (job.style.trigger, job.style.weight, job.knobs["steps"]) == ("ink drawing", 1.0, 2)
    assert (job.samples.width, job.samples.guidance, job.samples.steps, job.samples.n_images) == (64, 5.0, 3, 2)
    assert from_json(to_json(job)) == job
    assert str(files) not in json.dumps(identity(job))


def test_identity_stays_when_everything_moves(place, files, tmp_path_factory):
    import shutil

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(files / "sdxl", elsewhere / "sdxl")
    shutil.copytree(files / "loras", elsewhere / "m")
    assert [job.job_id for job in planned(elsewhere).jobs] == [job.job_id for job in planned(place).jobs]


def test_defaults_and_carried_modules_are_stated(place):
    text = "\n".join(summary_lines(planned(place)))
    for line in (
        "subjects.cat: 18 of text_encoder, 19 of text_encoder_2, 134 of unet",
        "subjects.dog.trigger: 'zwx dog', from the LoRA file's header",
        "subjects.cat.trigger: 'sks cat', from its prompt",
        "subjects.dog, subjects.cat, styles.ink: The file does not give the alpha: alpha = rank, scale 1, was assumed.",
        "subjects.cat, styles.ink: no reference images, so images that the LoRA itself generates take their place",
        "samples.guidance: 5.0, as diffusers has it for this base",
        "samples.size: 64×64, what the base was trained at",
        "samples.scheduler: the base's own",
        "subjects: weight 1.0 for 1 of 2",
    ):
        assert f"  {line}\n" in text + "\n", line
    assert "ink.trigger" not in text


def test_summary(place):
    lines = list(summary_lines(planned(place)))
    assert lines[0].startswith(f"base      {place}/sdxl (sdxl, 64 px, epsilon, sha256 ")
    assert lines[1].startswith("LoRAs     2 subjects, 1 style, ")
    assert lines[2:6] == [
        "jobs      6: 0 committed, 6 to do",
        "          4 × ziplora",
        "          2 × direct",
        f"catalog   {place}/catalog",
    ]
    assert ", 12 images about " in lines[6]
    assert lines[7] == "takes     under 1 s: calibration under 1 s, merging under 1 s, sampling under 1 s"
    assert "a guess from operation counts, on one H100" in lines[8]


def test_json(place):
    found = json.loads(json.dumps(plan_json(planned(place)), allow_nan=False))
    assert found["counts"] == {"jobs": 6, "committed": 0, "left": 6}
    assert found["loras"][0]["layout"] == "kohya-sgm"
    assert found["loras"][0]["ranks"] == [4, 4]
    assert [job["committed"] for job in found["jobs"]] == [False] * 6
    assert found["bytes"]["total"] == sum(found["bytes"][part] for part in ("merged", "mergers", "peft", "samples"))


def test_what_is_committed_is_not_planned_again(place):
    catalog = Catalog(place / "catalog")
    jobs = planned(place).jobs
    for job in jobs[:2]:
        catalog.commit(
            job.job_id, identity(job), {"merged.safetensors": b"x"}, {"stages": {"merge": 3.0, "sample": 1.0}}
        )
    found = planned(place)
    assert found.committed == {job.job_id for job in jobs[:2]}
    assert found.left == jobs[2:]
    assert (found.duration.merge_s, found.duration.sample_s) == (12.0, 4.0)
    assert "2 finished entries" in found.duration.basis
    for job in jobs[2:]:
        catalog.commit(job.job_id, identity(job), {"merged.safetensors": b"x"}, {})
    done = planned(place)
    assert (done.left, done.n_bytes.total, done.duration.total_s) == ((), 0, 0)
    assert "nothing to do: every job of this manifest is committed" in list(summary_lines(done))


def test_sd15(place):
    text = MANIFEST.replace("../sdxl", "../sd15").replace("dog.safetensors", "sd15.safetensors")
    text = text.replace("cat.safetensors", "sd15.safetensors").replace("ink.safetensors", "sd15.safetensors")
    found = planned(place, text)
    assert found.problems == ()
    assert found.jobs[0].samples.guidance == 7.5


def test_loras_in_no_pair_are_not_looked_at(place):
    text = MANIFEST.replace("cat.safetensors", "none.safetensors") + "pairs: [[dog, ink]]\n"
    found = planned(place, text)
    assert found.problems == ()
    assert "subjects.cat: in no pair, so not looked at" in found.defaulted


def test_progress_gets_an_iterable_with_a_length(place):
    lengths = []

    def watch(steps):
        lengths.append(len(steps))
        return steps

    planned(place, watch=watch)
    assert lengths == [3]


# What is refused

HERE = "demo.yaml:3: subjects.dog"
RELATIVE = "relative paths begin at the manifest's directory"


def test_missing_file_and_directory(place):
    assert problems(place, with_lora("none.safetensors")) == [
        f"{HERE}.lora: none.safetensors: no such file or directory; {RELATIVE}"
    ]
    (place / "m/dir").mkdir()
    assert problems(place, with_lora("dir")) == [f"{HERE}.lora: dir is not a file; {RELATIVE}"]


def test_spoilt_files(place):
    whole = (place / "m/ink.safetensors").read_bytes()
    for name, content, message in (
        ("empty.safetensors", b"", "is empty: 0 bytes; was the upload or download cut short?"),
        ("short.safetensors", whole[:-7], "is truncated: its header describes "),
        ("header.safetensors", whole[:999], "is truncated: its header alone takes "),
        (
            "old.ckpt",
            b"\x80\x02}q\x00.",
            "is a Python pickle, as old PyTorch .ckpt and .pt files are; only safetensors",
        ),
        (
            "new.pt",
            b"PK\x03\x04" + bytes(99),
            "is a zip archive, as PyTorch's .ckpt, .pt and .bin files are; only safe",
        ),
        ("noise.safetensors", b"\x01" * 500, "is no safetensors file: "),
    ):
        (place / "m" / name).write_bytes(content)
        (problem,) = problems(place, with_lora(name))
        assert problem.startswith(f"{HERE}.lora: {name} {message}")


def test_lora_of_another_base(place):
    (problem,) = problems(place, with_lora("sd15.safetensors"))
    assert problem.startswith(
        f"{HERE}.lora: sd15.safetensors is a LoRA for SD 1.5, the base model is SDXL: of its 128 modules"
    )


def test_images_that_are_none(place):
    image = (place / "m/dog.png").read_bytes()
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(jpeg, "JPEG")
    for name, content in {
        "text.png": b"hello",
        "empty.png": b"",
        "cut.png": image[:60],
        "cut.jpg": jpeg.getvalue()[:-900],
        "vector.svg": b"<svg/>",
    }.items():
        (place / "m" / name).write_bytes(content)
    text = MANIFEST.replace(
        "images: dog.png", "images: [text.png, dog.png, empty.png, cut.png, cut.jpg, vector.svg, no.png]"
    )
    kinds = "expected one of PNG, JPEG, WEBP, BMP, TIFF"
    found = problems(place, text)
    assert found[:2] + found[4:] == [
        f"{HERE}.images[0]: text.png is no image; {kinds}",
        f"{HERE}.images[2]: empty.png is empty: 0 bytes; expected an image",
        f"{HERE}.images[5]: vector.svg is no image; {kinds}",
        f"{HERE}.images[6]: no.png: no such file or directory; {RELATIVE}",
    ]
    assert found[2].startswith(f"{HERE}.images[3]: cut.png is damaged (")
    assert found[3].startswith(f"{HERE}.images[4]: cut.jpg is damaged (")


def test_one_bad_lora_hides_nothing_else(place):
    text = (
        with_lora("none.safetensors").replace("../catalog", "../catalog\n").replace("steps: 3", "steps: 3, size: 100")
    )
    text = text.replace("cat.safetensors", "sd15.safetensors")
    found = planned(place, text)
    assert [problem.split(": ")[1] for problem in found.problems] == [
        "subjects.dog.lora",
        "subjects.cat.lora",
        "samples.size",
    ]
    assert found.jobs == ()
    with pytest.raises(ManifestError) as caught:
        found.check()
    assert str(caught.value).splitlines() == list(found.problems)
    assert "3 problems to mend first" in list(summary_lines(found))


def test_pairs_without_the_bad_lora_remain(place):
    assert {job.pair for job in planned(place, with_lora("none.safetensors")).jobs} == {"cat/ink"}


def test_missing_base_still_checks_the_loras(place):
    text = with_lora("none.safetensors").replace("../sdxl", "../nosuchbase")
    assert problems(place, text) == [
        "demo.yaml:1: base: base …/nosuchbase does not exist; expected a diffusers directory, s3://bucket/prefix or a"
        " hub id such as "
        "stabilityai/stable-diffusion-xl-base-1.0",
        f"{HERE}.lora: none.safetensors: no such file or directory; {RELATIVE}",
    ]


def test_size_that_the_base_cannot_make(place):
    assert problems(place, MANIFEST.replace("steps: 3", "steps: 3, size: [64, 100]")) == [
        "demo.yaml:8: samples.size: 64×100 pixels do not fit the base; expected multiples of 8"
    ]


def test_missing_bucket_and_wrong_credentials(place, swift, monkeypatch):
    text = MANIFEST.replace("../catalog", "s3://no-such-bucket/x")
    (problem,) = problems(place, text)
    assert problem.startswith("demo.yaml:9: output: ")
    assert "no-such-bucket" in problem
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (problem,) = problems(place, MANIFEST.replace("../catalog", f"{swift.url}/x"))
    assert problem.startswith("demo.yaml:9: output: ")


def test_loras_and_catalog_in_object_storage(place, swift):
    import boto3

    s3 = boto3.client("s3")
    for name in ("dog.safetensors", "cat.safetensors", "ink.safetensors", "dog.png"):
        s3.put_object(Bucket=swift.bucket, Key=f"m/{name}", Body=(place / "m" / name).read_bytes())
    text = MANIFEST.replace("../sdxl", f"{place}/sdxl").replace("../catalog", f"{swift.url}/catalog")
    s3.put_object(Bucket=swift.bucket, Key="m/demo.yaml", Body=text.encode())
    remote = plan(read_manifest(f"{swift.url}/m/demo.yaml"), digests=DigestCache(place / "digests"))
    assert remote.problems == ()
    assert [job.job_id for job in remote.jobs] == [job.job_id for job in planned(place).jobs]
    assert remote.jobs[0].subject.lora == f"{swift.url}/m/dog.safetensors"


IMPORTS = """
import sys
from pathlib import Path
from service.inputs import DigestCache
from service.manifest import read_manifest
from service.plan import plan
from service.plan_text import summary_lines
found = plan(read_manifest(sys.argv[1]), digests=DigestCache(Path(sys.argv[2])))
assert len(found.jobs) == 6, found.problems
list(summary_lines(found))
heavy = {"torch", "ray", "diffusers", "transformers", "peft", "safetensors", "numpy", "pyarrow", "boto3"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_planning_imports_nothing_heavy(place):
    (place / "m/demo.yaml").write_text(MANIFEST)
    command = [sys.executable, "-c", IMPORTS, str(place / "m/demo.yaml"), str(place / "digests")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("role", "prompt", "trigger"),
    [
        ("subject", "a photo of sks dog", "sks dog"),
        ("subject", "photo of a sks dog", "sks dog"),
        ("subject", "sks dog", "sks dog"),
        ("style", "a cat in szn style", "szn style"),
        ("style", "a cat in the style of szn", "style of szn"),
        ("style", "szn painting", "szn painting"),
        ("style", "a painting of szn", "szn"),
    ],
)
def test_trigger_from_a_prompt(role, prompt, trigger):
    assert derived_trigger(prompt, role) == trigger


# Where there are images and no LoRA

TRAINED = MANIFEST.replace("lora: dog.safetensors, ", "").replace("merge: ", "training: {rank: 4}\nmerge: ")


def test_what_is_to_be_trained_is_said_with_its_cost(place):
    found = planned(place, TRAINED)
    found.check()
    assert [training.pair for training in found.trainings_left] == ["subjects.dog"]
    assert found.duration.train_s > 0
    text = "\n".join(summary_lines(found))
    assert "trains    subjects.dog on 1 image: rank 4, 1000 steps of 1, lr 5e-05\n" in text
    assert "takes" in text
    assert ": training " in text
    assert [one["trained"] for one in plan_json(found)["trainings"]] == [False]
    dog, _ = planned(place).jobs[0], found.jobs[0]
    assert found.n_bytes.merged == pytest.approx(planned(place).n_bytes.merged, rel=0.01)  # of rank 4, as the file is
    assert {job.subject.lora_sha256 for job in found.jobs if job.subject.id == "dog"} == {found.trainings[0].job_id}
    assert dog.subject.lora_sha256 != found.trainings[0].job_id


def test_joint_training_looks_at_no_lora(place):
    text = (
        MANIFEST.replace("ink drawing}", "szn style, images: dog.png}")
        .replace("a photo of sks dog", "a photo of zwx dog")
        .replace("merge: [{steps: 2, seeds: [0, 1]}, direct]", "merge: {method: joint, rank: 4, steps: 5}")
        .replace("output:", "pairs: [[dog, ink]]\noutput:")
    )
    (job,) = planned(place, text).jobs
    assert (job.loras, job.trainings, job.subject.weight) == ((), (), 1.0)
    assert job.subject.captions == ("a photo of zwx dog",)
    assert identity(job)["style"]["captions"] == ["a cat in szn style"]
    assert from_json(to_json(job)) == job
    assert planned(place, text).duration.merge_s > 0
    without = planned(
        place, text.replace("lora: dog.safetensors, ", "").replace("zwx dog,", "zwx dog, trigger: zwx dog,")
    )
    assert without.trainings == ()
    assert [job.job_id for job in without.jobs] == [job.job_id]


FIT = "36 pixels do not fit the base; expected a multiple of 8"
NO_FILE = "no such file or directory; relative paths begin at the manifest's directory"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{rank: 4}", "{size: 36}", f"demo.yaml:7: training.size: {FIT}"),
        ("dog.png", "dog.png, training: {size: 36}", f"demo.yaml:3: subjects.dog.training.size: {FIT}"),
        (
            "dog.png",
            "dog.png, trigger: sks cat",
            "demo.yaml:3: subjects.dog.trigger: the prompt 'a photo of sks dog' does not contain the trigger 'sks cat';"
            " correct one of them",
        ),
        ("dog.png", "none.png", f"demo.yaml:3: subjects.dog.images: none.png: {NO_FILE}"),
    ],
)
def test_what_cannot_be_trained(place, old, new, message):
    assert problems(place, TRAINED.replace(old, new)) == [message]


def test_a_caption_without_the_trigger(place):
    (place / "m/dog.txt").write_text("a cat")
    assert problems(place, TRAINED) == [
        "demo.yaml:3: subjects.dog.images: the caption dog.txt, 'a cat', does not contain the trigger 'sks dog'"
    ]
    (place / "m/dog.txt").write_text("sks dog on a beach")
    (training,) = planned(place, TRAINED).trainings
    assert training.captions == ("sks dog on a beach",)
