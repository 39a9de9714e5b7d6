"""Every fault of docs/faults.md has a test that bears its id, and no test bears an id that is not there."""

import ast
import re
from collections import defaultdict
from pathlib import Path

from conftest import ROOT

ROW = re.compile(r"^\| ([A-Z]\d+) \| (\d) \| ([UENMG]) \| .+ \|$", re.MULTILINE)


def listed() -> dict[str, int]:
    """Map the ids of the table to their priorities."""
    return {name: int(priority) for name, priority, _ in ROW.findall((ROOT / "docs" / "faults.md").read_text())}


def marked() -> dict[str, list[str]]:
    """Map the ids in the markers of the tests to the tests, without importing them."""
    found = defaultdict(list)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for marker in getattr(node, "decorator_list", []):
                if isinstance(marker, ast.Call) and ast.unparse(marker.func) == "pytest.mark.faults":
                    for name in map(ast.literal_eval, marker.args):
                        found[name].append(f"{path.name}::{node.name}")
    return found


def test_the_table_has_every_fault_of_priority_0_and_each_of_them_has_a_test():
    first = {name for name, priority in listed().items() if priority == 0}
    counts = {"D": 8, "P": 10, "X": 10, "R": 7, "C": 6, "S": 10}
    assert {letter: sum(name[0] == letter for name in first) for letter in counts} == counts and len(first) == 51
    without = sorted(first - marked().keys())
    print("of priority 0 without a test:", ", ".join(without) or "none")
    assert not without


def test_every_other_fault_of_the_table_has_a_test_too():
    assert not listed().keys() - marked().keys()


def test_no_test_bears_an_id_that_the_table_does_not_explain():
    unknown = marked().keys() - listed().keys()
    assert not unknown, {name: marked()[name] for name in unknown}
