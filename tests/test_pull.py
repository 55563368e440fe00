"""Files out of a catalog: kept, resumed, refused; where each tool looks for them; and catalogs that mean harm."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.catalog import Catalog
from service.entry import Entry, write_entry
from service.errors import Unavailable
from service.file_names import stem_of
from service.pull import Pulled
from service.storage import LocalStore
from tests.catalogs import files_of, fill, id_of, identity
from tests.conftest import Swift


def listed(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.exists() else []


def states(pulled: Iterator[Pulled] | Any) -> dict[str, str]:
    return {f"{item.path.name}": item.state for item in pulled}


class TestPull:
    def test_merged_files_come_with_their_sidecars(self, catalog: Catalog, tmp_path: Path) -> None:
        fill(catalog, *(identity(subject, style) for subject in ("dog", "cat") for style in ("oil", "ink")))
        steps = catalog.pull(tmp_path / "out", subject="d*", style="o?l")
        assert len(steps) == 3
        job = identity("dog", "oil")
        stem = f"dog__oil__ziplora-{id_of(job)[:8]}"
        assert states(steps) == {f"{stem}{suffix}": "pulled" for suffix in (".safetensors", ".json", ".png")}
        for suffix in (".safetensors", ".json", ".png"):
            assert (tmp_path / "out" / f"{stem}{suffix}").read_bytes() == files_of(job)[f"merged{suffix}"]
        assert set(states(catalog.pull(tmp_path / "out", subject="d*", style="oil")).values()) == {"kept"}
        assert len(catalog.pull(tmp_path / "out", subject="D*")) == 0
        assert len(catalog.pull(tmp_path / "out", method="direct")) == 0

    def test_extras_lie_in_a_directory_beside(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        list(local.pull(tmp_path / "out", extras=["samples/*", "mergers.safetensors"]))
        (directory,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
        assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*.*")) == [
            "mergers.safetensors",
            "samples/000.png",
            "samples/001.png",
        ]

    def test_a_cut_is_resumed(self, tmp_path: Path) -> None:
        read = []

        class Cut(LocalStore):
            def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
                read.append((key.rpartition("/")[2], start))
                yield super().get_range(key, start, start + 1000)
                raise Unavailable("the store went away")

        job = identity()
        Catalog(tmp_path / "catalog").commit(id_of(job), job, {"merged.safetensors": os.urandom(2500)}, {})
        catalog, out = Catalog(Cut(tmp_path / "catalog")), tmp_path / "out"
        for _ in range(2):
            (pulled,) = catalog.pull(out)
            assert (pulled.state, pulled.problem) == ("failed", "the store went away")
            assert not pulled.path.exists()
        (pulled,) = Catalog(tmp_path / "catalog").pull(out)
        assert pulled.state == "resumed"
        assert read == [("merged.safetensors", 0), ("merged.safetensors", 1000)]
        assert pulled.path.stat().st_size == 2500
        assert [path.suffix for path in out.iterdir()] == [".safetensors"]

    def test_a_part_of_something_else_is_dropped(self, catalog: Catalog, tmp_path: Path) -> None:
        fill(catalog, identity())
        (pulled, *_) = sorted(catalog.pull(tmp_path), key=lambda item: item.name, reverse=True)
        right = pulled.path.read_bytes()
        part = pulled.path.with_name(f"{pulled.path.name}.part")
        for wrong, state in (
            (b"x" * 100, "pulled"),
            (b"x" * (len(right) + 9), "pulled"),
            (right, "resumed"),
            (right[:99], "resumed"),
        ):
            pulled.path.unlink()
            part.write_bytes(wrong)
            assert states(catalog.pull(tmp_path))[pulled.path.name] == state
            assert pulled.path.read_bytes() == right
            assert not part.exists()

    def test_a_file_that_was_changed_is_fetched_again(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        (tmp_path / "out").mkdir()
        for item in local.pull(tmp_path / "out"):
            item.path.write_bytes(item.path.read_bytes()[:-1] + b"?")
        assert set(states(local.pull(tmp_path / "out")).values()) == {"pulled"}

    def test_a_corrupted_object_is_refused_by_name(self, catalog: Catalog, tmp_path: Path) -> None:
        (entry,) = fill(catalog, identity())
        item = entry.objects["merged.safetensors"]
        body = catalog.store.get(item.key)
        for wrong in (body[:-1] + b"?", body[:-1], body + b"?", b""):
            catalog.store.put(item.key, wrong)
            by_name = {pulled.name: pulled for pulled in catalog.pull(tmp_path / "out")}
            failed = by_name.pop("merged.safetensors")
            assert failed.state == "failed"
            assert "merged.safetensors is not what its entry says" in (failed.problem or "")
            assert {pulled.state for pulled in by_name.values()} <= {"pulled", "kept"}
            assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".png"}

    def test_a_claim_of_more_than_fits_writes_nothing(self, local: Catalog, tmp_path: Path) -> None:
        (entry,) = fill(local, identity())
        objects = {
            n: replace(o, size=o.size if n != "merged.safetensors" else 1 << 40) for n, o in entry.objects.items()
        }
        local.store.put(f"entries/{entry.job_id}.json", write_entry(replace(entry, objects=objects)))
        failed = [item for item in local.pull(tmp_path / "out") if item.state == "failed"]
        assert [item.name for item in failed] == ["merged.safetensors"]
        assert "8,589,934,592 are allowed" in (failed[0].problem or "")
        (failed, *_) = (item for item in local.pull(tmp_path / "out", limit_bytes=1 << 41) if item.state == "failed")
        assert "are free" in (failed.problem or "")
        assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 1000

    def test_links_in_the_destination_are_not_followed(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        (tmp_path / "secret").write_bytes(b"secret")
        (path,) = (item.path for item in local.pull(tmp_path / "out") if item.name == "merged.png")
        path.unlink()
        path.with_name(f"{path.name}.part").symlink_to(tmp_path / "secret")
        assert states(local.pull(tmp_path / "out"))[path.name] == "failed"
        path.with_name(f"{path.name}.part").unlink()
        path.symlink_to(tmp_path / "secret")
        assert states(local.pull(tmp_path / "out"))[path.name] == "pulled"
        assert (tmp_path / "secret").read_bytes() == b"secret"
        assert not path.is_symlink()

    def test_who_stops_early_can_go_on(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, *(identity(f"s{i}") for i in range(30)))
        steps = iter(local.pull(tmp_path / "out"))
        next(steps)
        steps.close()  # type: ignore[attr-defined]
        assert 0 < len([path for path in (tmp_path / "out").iterdir() if path.suffix != ".part"]) < 90
        assert {item.state for item in local.pull(tmp_path / "out")} <= {"kept", "resumed", "pulled"}
        assert len(list((tmp_path / "out").iterdir())) == 90

    def test_killed_again_and_again_it_ends_complete(self, swift: Swift, tmp_path: Path) -> None:
        catalog, out = Catalog(swift.url), tmp_path / "out"
        jobs = [identity(f"s{i}") for i in range(4)]
        for job in jobs:
            catalog.commit(id_of(job), job, {"merged.safetensors": os.urandom(8 << 20)}, {})
        script = f"""
            import pathlib
            from service.catalog import Catalog
            for item in Catalog({swift.url!r}).pull(pathlib.Path({str(out)!r})):
                print(item.state, item.problem, flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        for n_bytes in (1 << 20, 12 << 20, 20 << 20):
            process = subprocess.Popen(command)
            while process.poll() is None and sum(path.stat().st_size for path in listed(out)) < n_bytes:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert {item.state for item in catalog.pull(out)} <= {"kept", "resumed", "pulled"}
        assert {item.state for item in catalog.pull(out)} == {"kept"}
        assert [path.suffix for path in listed(out)] == [".safetensors"] * 4


class TestHostileCatalogs:
    """Beside the damaged entries of test_catalog.py: entries of the right form that mean harm."""

    def test_a_linked_directory_in_the_destination_is_not_entered(self, local: Catalog, tmp_path: Path) -> None:
        (entry,) = fill(local, identity())
        outside, out = tmp_path / "outside", tmp_path / "out"
        outside.mkdir()
        out.mkdir()
        (out / stem_of(entry)).symlink_to(outside)
        found = list(local.pull(out, layout="diffusers"))
        assert {item.state for item in found} == {"failed"}
        assert "leads out of" in (found[0].problem or "") or "lead out of" in (found[0].problem or "")
        assert list(outside.iterdir()) == []

    def test_what_would_be_written_through_is_refused(self, local: Catalog, tmp_path: Path) -> None:
        fill(local, identity())
        out, secret = tmp_path / "out", tmp_path / "secret"
        secret.write_bytes(b"secret")
        (path,) = (item.path for item in local.pull(out) if item.name == "merged.png")
        part = path.with_name(f"{path.name}.part")
        for plant in (lambda: os.link(secret, part), lambda: os.mkfifo(part), part.mkdir):
            path.unlink(missing_ok=True)
            plant()
            (failed,) = (item for item in local.pull(out) if item.state != "kept")
            assert failed.state == "failed"
            part.rmdir() if part.is_dir() else part.unlink()
        assert secret.read_bytes() == b"secret"

    def test_names_of_unfinished_files_cannot_be_claimed(self, local: Catalog, tmp_path: Path) -> None:
        job = identity()
        local.commit(id_of(job), job, {"merged.safetensors": b"x", "samples/a.part": b"y"}, {})
        by_name = {item.name: item for item in local.pull(tmp_path / "out", extras=["samples/*"])}
        assert (by_name["merged.safetensors"].state, by_name["samples/a.part"].state) == ("pulled", "failed")

    def test_no_more_is_taken_than_was_promised(self, swift: Swift, tmp_path: Path) -> None:
        """An object of 24 MB behind an entry that promises 1 MB, and one that promises 10 GB."""
        catalog, job = Catalog(swift.url), identity()
        entry = catalog.commit(id_of(job), job, {"merged.safetensors": os.urandom(24 << 20)}, {})
        item = entry.objects["merged.safetensors"]
        for size, taken in ((1 << 20, 1 << 20), (10 << 30, 0)):
            lie = replace(entry, objects={item.name: replace(item, size=size)})
            catalog.store.put(f"entries/{entry.job_id}.json", write_entry(lie))
            largest = 0
            for pulled in catalog.pull(tmp_path / "out"):
                assert pulled.state == "failed"
                largest = max([largest, *(path.stat().st_size for path in listed(tmp_path / "out"))])
            assert largest <= taken
            assert listed(tmp_path / "out") == []

    def test_a_method_without_a_lora_is_left_out_with_its_reason(self, local: Catalog, tmp_path: Path) -> None:
        job = identity(method="k-lora")
        local.commit(id_of(job), job, {"samples/000.png": b"picture"}, {})
        (skipped,) = local.pull(tmp_path / "out")
        assert (skipped.state, skipped.problem) == (
            "skipped", "k-lora left no merged LoRA, only what `ziplora show` lists"
        )  # fmt: skip
        job = identity("cat", method="k-lora")
        local.commit(id_of(job), job, {"recipe.json": b"{}", "samples/000.png": b"picture"}, {})
        (skipped,) = local.pull(tmp_path / "out", subject="cat")
        assert skipped.problem is not None
        assert skipped.problem.startswith(
            "k-lora chooses between the two LoRAs at every step of sampling, so there is no"
        )


SAMPLES = {"samples": [
    {"object": "samples/000.png", "prompt": "a sks dog in szn style", "style_strength": 1.0},
    {"object": "samples/001.png", "prompt": "a sks dog in szn style", "style_strength": 0.4},
]}  # fmt: skip


class TestLayouts:
    @pytest.fixture
    def entry(self, local: Catalog) -> Entry:
        job = identity()
        return local.commit(id_of(job), job, files_of(job), SAMPLES)

    def pulled(self, local: Catalog, out: Path, layout: str) -> set[str]:
        assert {item.state for item in local.pull(out, layout=layout)} == {"pulled"}
        assert {item.state for item in local.pull(out, layout=layout)} == {"kept"}
        return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}

    @pytest.mark.parametrize("layout", ["flat", "a1111", "invokeai"])
    def test_sidecars_lie_where_a1111_forge_and_invokeai_look(
        self, local: Catalog, entry: Entry, tmp_path: Path, layout: str
    ) -> None:
        stem = stem_of(entry)
        found = self.pulled(local, tmp_path / "out", layout)
        assert found == {f"{stem}.safetensors", f"{stem}.json", f"{stem}.png"}

    def test_comfyui_has_the_preview_and_the_words_as_notes(self, local: Catalog, entry: Entry, tmp_path: Path) -> None:
        stem = stem_of(entry)
        found = self.pulled(local, tmp_path / "out", "comfyui")
        assert found == {f"{stem}.safetensors", f"{stem}.txt", f"{stem}.png"}
        notes = (tmp_path / "out" / f"{stem}.txt").read_text()
        assert notes == "Trigger words: sks dog, szn\nSample: a sks dog in szn style\n"

    def test_diffusers_gets_a_repository_of_the_hub(self, local: Catalog, entry: Entry, tmp_path: Path) -> None:
        stem = stem_of(entry)
        found = self.pulled(local, tmp_path / "out", "diffusers")
        names = {"README.md", "images/000.png", "pytorch_lora_weights.safetensors"}
        assert found == {f"{stem}/{name}" for name in names}
        assert (tmp_path / "out" / stem / "images/000.png").read_bytes() == files_of(dict(entry.job))["samples/000.png"]

    def test_unknown_layouts_and_scores_are_refused(self, local: Catalog, entry: Entry, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="layout forge is unknown; one of flat, a1111"):
            local.pull(tmp_path / "out", layout="forge")
        with pytest.raises(ValueError, match="score beauty is unknown; one of harmonic, style"):
            local.pull(tmp_path / "out", by="beauty")

    def test_extras_never_take_the_place_of_what_the_layout_wants(self, local: Catalog, tmp_path: Path) -> None:
        job = identity()
        objects = {**files_of(job), "README.md": b"evil", "pytorch_lora_weights.safetensors": b"evil"}
        local.commit(id_of(job), job, objects, {})
        assert {item.state for item in local.pull(tmp_path / "out", layout="diffusers", extras=["*"])} == {"pulled"}
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.read_bytes() == b"evil"]
