"""Changes of code: each is one change, valid Python, at the place it names."""

import ast
import sys

import pytest

from tests.docs.markdown import ROOT

CODE = '''"""Doc."""

LIMIT = 3


def scale(x, y, sign=1):
    """Doc with 1 + 1."""
    if x < y and not sign:
        raise ValueError(
            f"é {x + 1}"
        )
    total = x * 2 + y * 2
    print(pow(x, max(x, y)))
    print(zip([x], strict=True))
    return gcd(total, y).transpose(x, y).view(y, y)
'''


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("mutations", None)
    from mutations import mutants

    path = tmp_path / "scale.py"
    path.write_text(CODE, encoding="utf-8")
    text = path.read_bytes()
    return {
        mutant.name.removeprefix("scale.py scale: "): ast.parse(
            text[: mutant.start] + mutant.text.encode() + text[mutant.end :]
        )
        for mutant in mutants(path, "scale.py")
    }


def test_operators_constants_arguments_conditions_and_statements_change(made):
    assert set(made) == {
        "x < y -> (x <= y)",
        "x < y and not sign -> (x < y or not sign)",
        'if x < y and not sign: raise ValueError( f"é {x + 1}" )'
        " -> if not (x < y and (not sign)): raise ValueError(f'é {x + 1}')",
        'raise ValueError( f"é {x + 1}" ) -> pass',
        "x * 2 + y * 2 -> (x * 2 - y * 2)",
        "x * 2 -> (x / 2)",
        "y * 2 -> (y / 2)",
        "2 -> (3)",
        "2 -> (3) [2]",
        "print(pow(x, max(x, y))) -> pass",
        "pow(x, max(x, y)) -> (pow(max(x, y), x))",
        "print(zip([x], strict=True)) -> pass",
    }


def test_each_is_one_change(made):
    whole = ast.unparse(ast.parse(CODE)).splitlines()
    for name, tree in made.items():
        changed = ast.unparse(tree).splitlines()
        assert len(changed) == len(whole), name
        assert sum(a != b for a, b in zip(whole, changed, strict=True)) == 1, name
