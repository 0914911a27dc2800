"""The dream store: shards of synthesised images and a manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreamkit.errors import StoreError
from dreamkit.flat_state import hash_state
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.types import StoredImages

FORMAT = 4
MANIFEST = "manifest.json"
_HEADER = "dreamkit"
"""Under this key a file's header tells what the manifest does, should that be lost."""


@dataclass(frozen=True)
class Shard:
    """One finished batch, as the manifest lists it."""

    index: int
    file: str
    images: int
    sha256: str
    seconds: float
    loss: float
    r_feature: float | None


@dataclass(frozen=True)
class Skipped:
    """A batch that came to nothing."""

    index: int
    images: int
    reason: str


@dataclass(frozen=True)
class State:
    """What a synthesizer carries from batch to batch, after the batches before ``following``."""

    following: int
    file: str
    sha256: str


class DreamStore:
    """A folder of safetensors shards, one for each batch, with a manifest.

    A shard holds ``images`` (N, C, H, W) uint8, ``labels`` (N,) int64 and ``teacher_logits``
    (N, K) float16. It counts once the manifest names it, and the manifest is replaced whole. Every
    file tells what it is itself: from them a manifest that is lost or damaged is made anew.

    Args:
        folder: where it lies; made when the first batch is written.
        settings: what the dreams depend on; a store of other settings is refused. None to
            read whatever is there.

    Raises:
        StoreError: the folder's dreams were made with other settings, or its manifest is damaged
            and so are all shards.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.settings = settings or {}
        self.choices: dict[str, Any] = {}
        """What the machine settled and the dreams depend on; written with the first batch."""
        self.shards: dict[int, Shard] = {}
        self.skipped: dict[int, Skipped] = {}
        """Batches that came to nothing, and are not tried again."""
        self.state: State | None = None
        self.notes: list[str] = []
        """What was mended, for the user to know."""
        self._verified: set[str] = set()
        manifest = folder / MANIFEST
        if manifest.is_file() or self._written("shard"):
            self._read(manifest, settings)
        elif settings is None:
            raise StoreError(f"{folder} holds no dreams (no {MANIFEST})")

    def _read(self, manifest: Path, settings: dict[str, Any] | None) -> None:
        try:
            data = json.loads(manifest.read_text(encoding="utf-8"))
            self._take(manifest, data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._recover(manifest, error)
        settings = None if settings is None else json.loads(json.dumps(settings))
        if settings is not None and self.settings != settings:
            stored = self.settings
            differing = sorted(k for k in {*stored, *settings} if stored.get(k) != settings.get(k))
            raise StoreError(
                f"{self.folder} holds dreams made with other settings ({', '.join(differing)}); "
                "choose another folder with --out"
            )
        if settings is not None:  # the run itself: it can dream again what is gone
            there = {i: s for i, s in self.shards.items() if (self.folder / s.file).is_file()}
            self.shards = there

    def _take(self, manifest: Path, data: dict[str, Any]) -> None:
        if data["format"] != FORMAT:
            raise StoreError(
                f"{manifest} is of format {data['format']}, and this version of dreamkit reads "
                f"{FORMAT}: read it with the version that wrote it"
            )
        shards = {entry["index"]: Shard(**entry) for entry in data["shards"]}
        if any(Path(shard.file).name != shard.file for shard in shards.values()):
            raise ValueError("a shard lies elsewhere")
        stored, choices = data["settings"], data["choices"]
        skipped = {entry["index"]: Skipped(**entry) for entry in data["skipped"]}
        state = None if data["state"] is None else State(**data["state"])
        if state is not None and Path(state.file).name != state.file:
            raise ValueError("the state lies elsewhere")
        self.settings, self.choices, self.shards = stored, choices, shards
        self.skipped, self.state = skipped, state

    # --- what is lost or damaged --------------------------------------------------------------

    def _written(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*.safetensors"))

    def _recover(self, manifest: Path, reason: Exception) -> None:
        """Learn from the shards what the manifest told, but for the seconds that they took.

        Raises:
            StoreError: no shard is intact, or they are of several runs.
        """
        found = [told for path in self._written("shard") if (told := _told_by(path)) is not None]
        if not found or any(told.facts["settings"] != found[0].facts["settings"] for told in found):
            raise StoreError(
                f"{manifest} is damaged ({reason}), and the shards beside it do not tell what it "
                "did; remove the folder"
            ) from reason
        self.settings, self.choices = found[0].facts["settings"], found[0].facts["choices"]
        for path in self._written("state"):  # the last one that is intact
            state = _told_by(path)
            if state is not None:
                self.state = State(state.facts["following"], path.name, _digest(path))
                self.skipped = {e["index"]: Skipped(**e) for e in state.facts["skipped"]}
        following = 0 if self.state is None else self.state.following
        for told in found:
            if not told.facts["carried"] or told.facts["index"] < following:
                self._adopt(told)
        self.notes.append(f"{manifest} was damaged or gone; {len(found)} shards tell what it did")

    def _adopt(self, told: _Told) -> None:
        """Count a shard that tells what it is; how long it took it does not tell."""
        index, loss, r_feature = (told.facts[key] for key in ("index", "loss", "r_feature"))
        digest, name = _digest(told.path), told.path.name
        self.shards[index] = Shard(index, name, told.images, digest, 0.0, loss, r_feature)

    def mend(self) -> None:
        """Set damaged shards aside, and count those whose writer was killed before it could.

        Raises:
            StoreError: later batches build on a shard that is damaged.
        """
        before, noted = dict(self.shards), len(self.notes)
        for shard in before.values():
            if not self._intact(shard.file, shard.sha256):
                self._set_aside(shard)
        listed = {shard.file for shard in self.shards.values()}
        for path in self._written("shard"):
            told = _told_by(path) if path.name not in listed else None
            if told is not None and self._is_ours(told):
                self._adopt(told)
        if self.shards != before or noted:
            self._write_manifest(self.shards, self.state)

    def _is_ours(self, told: _Told) -> bool:
        """Whether a shard that the manifest does not name could be of this run."""
        facts = told.facts
        same = facts["settings"] == self.settings and facts["choices"] == self.choices
        return same and not facts["carried"] and facts["index"] not in self.shards

    def _set_aside(self, shard: Shard) -> None:
        path = self.folder / shard.file
        if self.state is not None:
            self._open_shard(shard)  # says what is wrong and what to do
        aside = path.with_name(f"{path.name}.damaged")
        try:
            path.replace(aside)
        except OSError as error:
            raise StoreError(f"{path} is damaged, and stays: {error.strerror}") from error
        del self.shards[shard.index]
        self.notes.append(
            f"{path} is damaged: it is set aside as {aside.name}, and its batch is dreamed again"
        )

    def merge(self, others: Sequence[DreamStore]) -> None:
        """Take over what other ranks wrote into this folder."""
        for other in others:
            self.shards = {**other.shards, **self.shards}
            self.skipped = {**other.skipped, **self.skipped}
            self._verified |= other._verified
        if self.shards:
            self._write_manifest(self.shards, self.state)

    def _intact(self, name: str, sha256: str) -> bool:
        """Whether a file is what the manifest vouches for; looked at once."""
        if name not in self._verified:
            try:
                if _digest(self.folder / name) != sha256:
                    return False
            except OSError:
                return False
            self._verified.add(name)
        return True

    def damaged(self) -> list[str]:
        """Return the names of files that are gone or not what the manifest vouches for."""
        files = {shard.file: shard.sha256 for shard in self.shards.values()}
        if self.state is not None:
            files[self.state.file] = self.state.sha256
        return [name for name, sha256 in files.items() if not self._intact(name, sha256)]

    # --- reading and writing ------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(shard.images for shard in self.shards.values())

    def __contains__(self, index: object) -> bool:
        return index in self.shards

    @property
    def seconds(self) -> float:
        """Time spent dreaming what is stored."""
        return sum(shard.seconds for shard in self.shards.values())

    @property
    def r_feature(self) -> float | None:
        """R_feature averaged over the stored images, where the teacher has BatchNorm."""
        known = [(s.r_feature, s.images) for s in self.shards.values() if s.r_feature is not None]
        if not known:
            return None
        return sum(value * n for value, n in known) / sum(n for _, n in known)

    def write(
        self,
        index: int,
        content: StoredImages,
        seconds: float,
        loss: float,
        r_feature: float | None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add one batch, whole or not at all, and what the synthesizer carries on from it."""
        assert content.teacher_logits is not None
        tensors = {
            "images": content.images.cpu().contiguous(),
            "labels": content.labels.cpu().contiguous(),
            "teacher_logits": content.teacher_logits.to("cpu", torch.float16).contiguous(),
        }
        told = {
            "index": index,
            "loss": loss,
            "r_feature": r_feature,
            "settings": self.settings,
            "choices": self.choices,
            "carried": bool(state),
        }
        blob = _saved(tensors, told)
        name = f"shard-{index:06d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be made: {error.strerror}") from error
        write_atomically(self.folder / name, blob, by_any_rank=True)
        digest = hashlib.sha256(blob).hexdigest()
        shard = Shard(index, name, len(content), digest, seconds, loss, r_feature)
        shards, before = self.shards | {index: shard}, self.state
        after = self._write_state(index + 1, state) if state else before
        self._write_manifest(shards, after)
        self.shards, self.state = shards, after
        if before is not None and before != after:
            (self.folder / before.file).unlink(missing_ok=True)

    def _write_state(self, following: int, tensors: Mapping[str, Tensor]) -> State:
        state = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        skipped = [asdict(batch) for batch in self.skipped.values()]
        blob = _saved(state, {"following": following, "skipped": skipped})
        name = f"state-{following:06d}.safetensors"
        write_atomically(self.folder / name, blob)
        return State(following, name, hashlib.sha256(blob).hexdigest())

    def read_state(self) -> dict[str, Tensor]:
        """Return what the synthesizer carries on from the last batch; empty if nothing.

        Raises:
            StoreError: it is damaged, or a batch that it follows is gone.
        """
        if self.state is None:
            return {}
        gone = [
            index
            for index in range(self.state.following)
            if index not in self.shards and index not in self.skipped
        ]
        if gone:
            raise StoreError(
                f"{self.folder}: batch {gone[0]} is gone, and this synthesizer's batches build on "
                "one another, so that it cannot be made again by itself; remove the folder"
            )
        return self._open_file(self.state.file, self.state.sha256, "remove the folder")

    def skip(self, index: int, images: int, reason: str) -> None:
        """Note that a batch came to nothing; where there is no other yet, in memory alone."""
        self.skipped[index] = Skipped(index, images, reason)
        if self.shards:
            self._write_manifest(self.shards, self.state)

    def lacks(self, images: int) -> bool:
        """Whether there are fewer images than these, those of skipped batches counted."""
        return len(self) + sum(batch.images for batch in self.skipped.values()) < images

    def _write_manifest(self, shards: dict[int, Shard], state: State | None) -> None:
        data = {
            "format": FORMAT,
            "settings": self.settings,
            "choices": self.choices,
            "shards": [asdict(shards[index]) for index in sorted(shards)],
            "skipped": [asdict(self.skipped[index]) for index in sorted(self.skipped)],
            "state": None if state is None else asdict(state),
        }
        write_json(self.folder / MANIFEST, data)

    def open(self, first: int | None = None) -> ShardedImages:
        """Verify shards and return their images in the order of the batches.

        Args:
            first: open only as many shards as hold this many images.

        Raises:
            StoreError: there is none, or one is missing or not what the manifest vouches for.
        """
        if not self.shards:
            raise StoreError(f"{self.folder} holds no dreams")
        opened: list[dict[str, Tensor]] = []
        count = 0
        for index in sorted(self.shards):
            if first is not None and count >= first:
                break
            opened.append(self._open_shard(self.shards[index]))
            count += self.shards[index].images
        return ShardedImages(opened)

    def read(self, index: int) -> StoredImages:
        """Return one batch, verified.

        Raises:
            StoreError: it is missing or not what the manifest vouches for.
        """
        tensors = self._open_shard(self.shards[index])
        return StoredImages(tensors["images"], tensors["labels"], tensors["teacher_logits"])

    def _open_shard(self, shard: Shard) -> dict[str, Tensor]:
        fix = "delete the file, and the same command dreams that batch again"
        if self.state is not None:
            fix = "remove the folder: later batches build on it"
        return self._open_file(shard.file, shard.sha256, fix)

    def _open_file(self, name: str, sha256: str, fix: str) -> dict[str, Tensor]:
        path = self.folder / name
        try:
            if name not in self._verified and _digest(path) != sha256:
                raise StoreError(f"{path} is damaged: its SHA-256 is not the manifest's; {fix}")
            self._verified.add(name)
            return safetensors.torch.load_file(path)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _saved(tensors: dict[str, Tensor], told: dict[str, Any]) -> bytes:
    """Return a file that tells what it is, and vouches for its tensors."""
    text = json.dumps(told | {"format": FORMAT, "sha256": hash_state(tensors)})
    blob: bytes = safetensors.torch.save(tensors, {_HEADER: text})
    return blob


class _Told(NamedTuple):
    """What an intact file tells of itself, and how many images it has."""

    path: Path
    facts: dict[str, Any]
    images: int


def _told_by(path: Path) -> _Told | None:
    """Return what a file tells of itself; None if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["format"] != FORMAT or facts["sha256"] != hash_state(tensors):
            return None
        return _Told(path, facts, len(tensors["images"]) if "images" in tensors else 0)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


class ShardedImages:
    """The images of a store. They are mapped from disk, so that they need not fit in memory.

    Args:
        shards: the tensors of each shard.
    """

    def __init__(self, shards: Sequence[dict[str, Tensor]]) -> None:
        self._images = [shard["images"] for shard in shards]
        self._place = [(s, row) for s, part in enumerate(self._images) for row in range(len(part))]
        self.labels = torch.cat([shard["labels"] for shard in shards])
        """(N,) int64."""
        self.teacher_logits = torch.cat([shard["teacher_logits"] for shard in shards])
        """(N, K) float16."""

    def __len__(self) -> int:
        return len(self._place)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(self._images[0].shape[1:])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return stored images (N, C, H, W) uint8 and labels (N,)."""
        rows = [self._place[index] for index in indices]
        images = torch.stack([self._images[shard][row] for shard, row in rows])
        return images, self.labels[torch.as_tensor(indices)]
