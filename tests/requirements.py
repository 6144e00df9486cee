"""Print what pyproject.toml asks for, to build and use sparse24 and in its extras, as arguments for pip."""

from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
extras = pyproject["project"]["optional-dependencies"].values()
requirements = sum(extras, pyproject["build-system"]["requires"] + pyproject["project"]["dependencies"])
print(*(requirement for requirement in requirements if not requirement.startswith("sparse24[")))
