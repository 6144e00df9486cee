"""The list of mutants (tests/mutants.toml): each applies, the test that it names exists, and trying one tells."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


@pytest.fixture
def mutate(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))
    import mutate

    return mutate


def test_every_mutant_applies(mutate):
    mutants = mutate.read_mutants()
    assert len(mutants) >= 80
    assert len({(m.area, m.name) for m in mutants}) == len(mutants)
    for mutant in mutants:
        text = (mutate.ROOT / mutant.file).read_text()
        assert text.count(mutant.before) == 1, f"{mutant.before!r} stands not once in {mutant.file}"
        assert mutant.before != mutant.after


def test_every_named_test_exists(mutate):
    functions: dict[str, set[str]] = {}
    for path in (TESTS / "python").rglob("test_*.py"):
        body = ast.parse(path.read_text()).body
        named = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        functions[path.relative_to(TESTS / "python").as_posix()] = named
    for path in (TESTS / "cpp").rglob("test_*.cpp"):
        executable = path.stem if path.stem.endswith("_emulated") else mutate.HOST
        named = re.findall(r"^(?:TYPED_)?TEST(?:_[FP])?\((\w+), (\w+)\)", path.read_text(), re.MULTILINE)
        functions.setdefault(executable, set()).update(f"{suite}.{name}" for suite, name in named)
    for mutant in mutate.read_mutants():
        where, _, name = mutant.test.replace("::", ":").partition(":")
        assert name in functions[where], mutant.test


class Recorder:
    """Stands for a copy, in which `passes` says which tests pass while a file holds some text."""

    def __init__(self, tree, passes):
        self.tree, self.seen = tree, []
        self._passes = passes

    def check(self, tests):
        pass

    def sound(self, test):
        return self.passes(test)

    def passes(self, test):
        self.seen.append((self.tree / "file").read_text())
        return self._passes(self.seen[-1])


def test_a_mutant_is_killed_or_not(mutate, tmp_path, capsys):
    def try_one(passes, before="one"):
        (tmp_path / "file").write_text("one and two")
        copy = Recorder(tmp_path, passes)
        mutant = mutate.Mutant("area", "name", "file", before, "three", "test_x.py::test_y")
        results = mutate.run([mutant], copy)
        assert (tmp_path / "file").read_text() == "one and two"
        return results[0][1], copy.seen, mutate.report(results)

    seen = ["one and two", "three and two"]
    assert try_one(lambda text: "one" in text) == (mutate.KILLED, seen, 0)
    assert try_one(lambda text: True) == (mutate.SURVIVED, seen, 1)
    result, seen, status = try_one(lambda text: False)
    assert result.startswith("BROKEN: test_x.py::test_y fails without it") and len(seen) == status == 1
    result, seen, status = try_one(lambda text: True, before="four")
    assert result.startswith("BROKEN: its text stands 0 times") and not seen and status == 1
    assert "| area | 0 | 1 | 0 |" in capsys.readouterr().out


def test_an_area_that_is_not_there(mutate, capsys):
    assert mutate.main(["--only", "nothing"]) == 1
    assert "expected a mutant or an area, got ['nothing']" in capsys.readouterr().out
