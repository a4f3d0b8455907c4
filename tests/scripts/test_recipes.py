"""Option files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, Capture, user_error

from sst2_xlmr.cli import parse_args

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.args"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_holds_options_and_its_sources(recipe: Path) -> None:
    config, _ = parse_args([f"@{recipe}"])
    assert config.batch_size in (16, 32)
    assert 1e-5 <= config.lr <= 1e-4, "beyond the rates that encoders of this kind are fine-tuned with"
    text = recipe.read_text(encoding="utf-8")
    assert "Source: " in text or "https://" in text
    command = re.search(r"^# python train.py (.+)$", text, re.MULTILINE)
    assert command, "it says how it is used"
    assert f"@scripts/recipes/{recipe.name}" in command[1].split()
    if recipe.stem == "torchrecipes":
        assert (config.lr, config.batch_size, config.epochs, config.weight_decay) == (1e-5, 16, 1, 0.0)
        assert (config.schedule, config.warmup_ratio, config.max_grad_norm) == ("constant", 0.0, 0.0)


def test_a_file_of_options_and_what_overrides_it(tmp_path: Path) -> None:
    (tmp_path / "a.args").write_text("# it's a comment\n--lr 3e-5  # why\n\n--label-names 'not so,yes' --epochs=7\n")
    config, _ = parse_args(["--epochs", "2", f"@{tmp_path / 'a.args'}", "--lr", "1e-4"])
    assert (config.lr, config.epochs) == (1e-4, 7), "the last one wins"
    assert config.label_names == ["not so", "yes"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read {file}, named by @{file}: No such file"),
        (b"--lr '3e-5", "{file} does not hold options: No closing quotation"),
        (b"--lr \xff", "{file} does not hold options: "),
    ],
)
def test_a_wrong_file_of_options(tmp_path: Path, content: bytes | None, says: str, capsys: Capture) -> None:
    file = tmp_path / "x.args"
    if content is not None:
        file.write_bytes(content)
    assert says.format(file=file) in user_error(lambda: parse_args([f"@{file}"]), capsys)
