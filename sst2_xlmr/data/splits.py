"""The files of a run, named by options or found in a folder; and splits of the training rows into dev or folds."""

import re
from pathlib import Path

import numpy as np

from sst2_xlmr.config import Config, named_file, plain_name
from sst2_xlmr.data.batches import splitmix64
from sst2_xlmr.data.formats import or_list
from sst2_xlmr.data.rows import label_name, read_options_for
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError

_EXTENSIONS = ("tsv", "csv", "jsonl", "json", "ndjson", "txt", "parquet", "xlsx", "arrow")
_SPLIT = re.compile(
    r"(?:(?P<train>train|training)|(?P<dev>dev|validation|val|valid)|(?P<test>test|testing))"
    rf"(?:-00000-of-[0-9]+)?(?:_text(?=\.txt))?(?:\.ft)?(?:\.(?:{'|'.join(_EXTENSIONS)})(?:\.gz|\.zip)?)?"
)
DEFAULT_SHARE, MAX_DEV_ROWS = 0.1, 5000  # of dev, if it is set aside from the training rows


def find_split(data_dir: Path, split: str, is_needed: bool = True) -> list[Path]:
    """Return a split's file, shards or folder; [] if absent and not needed. UserError if needed, or if two match."""
    paths, present = sorted(data_dir.iterdir()), []
    for path in paths:
        match = _SPLIT.fullmatch(path.name.lower())
        if match and match.lastgroup == split and path.is_file() == ("." in path.name):
            present.append(path)
    if present and "-00000-of-" in present[0].name:
        stem = present[0].name.split("-00000-of-")[0]
        return [path for path in paths if path.name.startswith(f"{stem}-0") and "-of-" in path.name]
    if len(present) > 1:
        names = " and ".join(path.name for path in present)
        raise UserError(f"{data_dir} has {names}; keep one, or use --{split}-file")
    if is_needed and not present:
        names = ", ".join(path.name for path in paths[:8]) or "nothing"
        wanted = or_list(f"{split}.{extension}" for extension in _EXTENSIONS[:4])
        raise UserError(f"{data_dir} has no {wanted} (it has {names}); name the file with --{split}-file")
    return present


def find_files(config: Config) -> tuple[dict[str, list[Path]], list[str]]:
    """Return split -> files (dev only if it has files of its own, test files by their names), and notes."""
    folder = Path(config.data_dir) if config.data_dir else None
    if folder is None and not config.train_file:
        folder = downloads.fetch_sst2()
    files = {"train": [Path(file) for file in config.train_file] or (find_split(folder, "train") if folder else [])}
    notes = []
    if config.dev_file:
        files["dev"] = [Path(config.dev_file)]
    elif folder and (found := find_split(folder, "dev", is_needed=False)):
        if config.dev_share is None:
            files["dev"] = found
        else:
            notes.append(f"{found[0].name} is not used: --dev-share sets training rows aside instead")
    files.update((name, [file]) for name, file in map(named_file, config.eval_file))
    for file in map(Path, config.test_file):
        name = plain_name(file)
        files[name if name not in (*files, "dev", "mean") else str(file)] = [file]
    tests = find_split(folder, "test", is_needed=False) if folder and not config.test_file else []
    if tests and label_name(tests[0], read_options_for(config, "test")) is not None:
        files["test"] = tests
    elif tests:  # like GLUE's
        notes.append(f"{tests[0].name} lacks a text or label column: unlabelled, not evaluated")
    return files, notes


def stratified_sample(digests: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the rows drawn, int64, ascending: the same share of each class, but never all of it.

    Rows with equal texts stay together. The result depends on texts, labels and seed alone, not on the order of rows.
    Digests are uint64 [rows], labels int [rows].
    """
    text_of, class_of, random = _texts(digests, labels, seed)
    order, copies = np.argsort(random, kind="stable"), np.bincount(text_of)
    chosen = np.zeros(len(random), bool)
    exact = assigned = 0.0
    for label in np.unique(labels):
        of_class = order[class_of[order] == label]
        total = int(copies[of_class].sum())
        exact += share * total
        wanted = min(max(1, round(exact - assigned)), total - 1)
        assigned += wanted
        for text in of_class:
            if copies[text] <= wanted:
                chosen[text] = True
                wanted -= int(copies[text])
            if wanted <= 0:
                break
    return np.flatnonzero(chosen[text_of])


def _texts(digests: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the text id of each row, int64 [rows], and each text's lowest label and a random number, [texts]."""
    texts, text_of = np.unique(digests, return_inverse=True)
    text_of, class_of = text_of.reshape(-1), np.full(len(texts), np.iinfo(np.int64).max)
    np.minimum.at(class_of, text_of, labels.astype(np.int64))
    random = splitmix64(texts + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64))
    return text_of, class_of, random ^ (random >> np.uint64(31))


def assign_folds(digests: np.ndarray, strata: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, int64 [rows], from 1: as even as possible in each stratum, equal texts together.

    For the arguments see `stratified_sample`. UserError if there are fewer distinct texts than folds.
    """
    text_of, stratum, random = _texts(digests, strata, seed)
    if len(random) < folds:
        raise UserError(f"--folds {folds}: there are only {len(random)} different texts")
    fold = np.empty(len(random), np.int64)
    fold[np.lexsort((random, stratum))] = np.arange(len(random)) % folds + 1
    return fold[text_of]
