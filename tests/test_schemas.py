"""What is published in schemas/ is what the code declares, and it says enough to be used without the code."""

import json
from pathlib import Path

import pytest

from brainseg.schemas import CONFIGS, contracts, write_schemas
from brainseg.tables import TABLES

SCHEMAS = Path(__file__).parents[1] / "schemas"
ADVICE = "differs from the code; run `brainseg schemas --out schemas` and say in CHANGELOG.md what changed"


@pytest.mark.parametrize("name", sorted(contracts()))
def test_a_published_contract_equals_the_code(name):
    published = SCHEMAS / name
    assert published.is_file(), f"{name} is not published; {ADVICE}"
    assert json.loads(published.read_text()) == json.loads(contracts()[name]), f"{name} {ADVICE}"


def test_nothing_else_is_published():
    assert {p.name for p in SCHEMAS.iterdir()} == set(contracts())


def test_publishing_writes_the_same_files_again(tmp_path):
    write_schemas(tmp_path / "new" / "place")
    written = {p.name: p.read_text() for p in (tmp_path / "new" / "place").iterdir()}
    assert written == {p.name: p.read_text() for p in SCHEMAS.iterdir()}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_column_of_a_table_says_what_it_means(name):
    def silent(columns):
        for column in columns:
            if not column["description"]:
                yield column["name"]
            yield from silent(column.get("fields", []))

    assert not list(silent(json.loads(contracts()[f"{name}.json"])["columns"]))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_config_admits_no_unknown_key(name):
    body = json.loads(contracts()[f"{name}.json"])
    groups = [body, *body.get("$defs", {}).values()]
    assert all(group["additionalProperties"] is False for group in groups if group["type"] == "object")
