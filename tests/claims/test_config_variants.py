"""Shipped configs whose head holds several commands: each is understood, and sets what its words say and nothing else."""

import json
import re
import shlex
from pathlib import Path

from lit_methods.catalog import configs_folder
from lit_methods.claims.fairness import flat
from lit_methods.cli.stage import resolve


def commands(file: Path) -> list[list[str]]:
    """The words of every whole ``lit fit`` in a config's head; a backslash joins a line with the next one."""
    head = "".join(f"{line}\n" for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")).replace("\\\n#", "")
    found = [shlex.split(words) for words in re.findall(r"^#\s+lit (fit --config \S+.*)$", head, flags=re.M) if "<" not in words]
    return [words for words in found if words[2].endswith(f"/{file.name}")]


def test_variants_in_the_head_of_a_config_resolve_to_what_they_say(tmp_path: Path) -> None:
    """A family of configs that differ in few values is one file; what the removed ones resolved to is kept by these words."""
    families = {file.stem: commands(file) for file in sorted((configs_folder() / "full").glob("*.yaml"))}
    families = {name: variants for name, variants in families.items() if len(variants) > 1}
    counts = {name: len(variants) - 1 for name, variants in families.items()}
    assert counts == {"superflow_finetune": 4, "superflow_semi": 1, "superflow_vits": 2, "tcm_cub": 3}
    asked = tmp_path / "commands.json"
    asked.write_text(json.dumps([words for variants in families.values() for words in variants]))
    resolve(asked)
    answers = iter(json.loads(asked.read_text()))
    for variants in families.values():
        base, *others = [next(answers) for _ in variants]
        assert "error" not in base, base
        plain = flat(base["config"])
        for words, answer in zip(variants[1:], others, strict=True):
            assert "error" not in answer, f"{shlex.join(words)}: {answer}"
            changed = {key.replace("init_args.", "") for key, value in flat(answer["config"]).items() if plain[key] != value}
            assert changed == {word.removeprefix("--") for word in words if word.startswith("--")} - {"config"}
            name = words[words.index("--name") + 1]
            assert answer["config"]["name"] == name, "the run goes to the folder that says which variant it is"
