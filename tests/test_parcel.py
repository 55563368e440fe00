"""What travels with a manifest to a cluster: the files beside it, as they lie."""

from pathlib import Path

import pytest

from service.errors import ManifestError
from service.manifest import read_manifest
from service.parcel import check_output, lay_out, pack, upload
from service.storage import Store

MANIFEST = """\
base: {base}
subjects: {{dog: {{lora: ../loras/dog.safetensors, prompt: a dog, images: "dog/*.png"}}}}
styles: {{ink: {{lora: s3://loras/ink.safetensors, prompt: ink}}, oil: {{lora: /srv/oil.safetensors, prompt: oil}}}}
output: {output}
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for name in ("loras/dog.safetensors", "here/dog/1.png", "here/dog/2.png", "here/dog/notes.txt", "base/unet/a.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    path = tmp_path / "here/grid.yaml"
    path.write_text(MANIFEST.format(base="../base", output="s3://bucket/catalog"))
    return path


def test_relative_paths_travel_and_others_stay(manifest: Path, tmp_path: Path) -> None:
    parcel = pack(read_manifest(manifest))
    assert parcel.manifest == "here/grid.yaml"
    travels = {"here/grid.yaml", "loras/dog.safetensors", "here/dog/1.png", "here/dog/2.png", "base/unet/a.json"}
    assert set(parcel.files) == travels
    assert parcel.there == ("/srv/oil.safetensors",)
    lay_out(parcel, tmp_path / "laid out")
    (tmp_path / "loras/dog.safetensors").unlink()  # nothing leads back
    again = pack(read_manifest(tmp_path / "laid out/here/grid.yaml"))
    assert set(again.files) == travels
    assert read_manifest(tmp_path / "laid out/here/grid.yaml").digest == read_manifest(manifest).digest


def test_where_it_is_sent_from_does_not_matter(manifest: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pack(read_manifest("../here/grid.yaml")) == pack(read_manifest(manifest))


def test_a_base_of_a_methods_own_travels(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "amused/vqvae").mkdir(parents=True)
    (tmp_path / "amused/vqvae/b.json").write_text("x")
    (tmp_path / "here/ink.png").write_text("x")
    own = "merge: [direct, {method: styledrop, base: ../amused}, {method: styledrop, base: owner/model}]\n"
    text = manifest.read_text()
    for style in ("lora: s3://loras/ink.safetensors", "lora: /srv/oil.safetensors"):
        text = text.replace(style, "images: ink.png")
    manifest.write_text(text + own)
    found = pack(read_manifest(manifest)).files
    assert {name for name in found if name.startswith("amused/")} == {"amused/vqvae/b.json"}


def test_pictures_without_a_lora_travel_with_their_captions(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "here/dog/2.txt").write_text("a dog on a beach")
    manifest.write_text(manifest.read_text().replace("lora: ../loras/dog.safetensors, ", ""))
    assert {name for name in pack(read_manifest(manifest)).files if name.startswith("here/dog")} == {
        "here/dog/1.png", "here/dog/2.png", "here/dog/2.txt"
    }  # fmt: skip


def test_a_hub_id_stays_and_what_is_missing_is_named(manifest: Path, tmp_path: Path) -> None:
    manifest.write_text(MANIFEST.format(base="owner/model", output="s3://bucket/catalog"))
    assert "owner/model" not in str(pack(read_manifest(manifest)))
    (tmp_path / "loras/dog.safetensors").unlink()
    with pytest.raises(ManifestError, match=r"grid.yaml:2: subjects.dog.lora: .*dog.safetensors does not exist, so it"):
        pack(read_manifest(manifest))


def test_a_catalog_that_would_vanish_with_the_job_is_refused(manifest: Path) -> None:
    manifest.write_text(MANIFEST.format(base="../base", output="catalog"))
    read = read_manifest(manifest)
    with pytest.raises(ManifestError, match=r"grid.yaml:4: output: catalog is a relative path, .*expected s3://bucket"):
        check_output(read, None)
    with pytest.raises(ManifestError, match="--output: here is a relative path"):
        check_output(read, "here")
    check_output(read, "/shared/catalog")


def test_by_way_of_a_store_it_arrives_whole_and_is_sent_once(manifest: Path, store: Store, tmp_path: Path) -> None:
    parcel = pack(read_manifest(manifest))
    key, steps = upload(parcel, store)
    assert len(steps) == 5
    assert list(steps)[-1] == "here/grid.yaml"
    assert store.get(key) == manifest.read_bytes()
    there = {found.key: found.modified for found in store.list()}
    assert {name.partition("/")[2] for name in there} == set(parcel.files)
    list(upload(parcel, store)[1])
    assert {found.key: found.modified for found in store.list()} == there
    (tmp_path / "here/dog/1.png").write_text("another picture")
    assert upload(pack(read_manifest(manifest)), store)[0] != key
