"""The front door: `import kdlib` is light, and its names are the objects of the packages."""

import doctest
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import kdlib
from kdlib.distillation.distill import distill
from kdlib.distillation.student_init import build_student
from kdlib.models.loading import load_encoder
from kdlib.pruning.model import prune_encoder
from kdlib.study.study import Study


def test_names_are_the_objects_of_the_packages():
    found = [kdlib.Study, kdlib.build_student, kdlib.distill, kdlib.load_encoder, kdlib.prune_encoder]
    assert found == [Study, build_student, distill, load_encoder, prune_encoder]
    assert kdlib.__version__ == version("kdlib")


def test_names_are_listed():
    names = {"Study", "build_student", "distill", "load_encoder", "prune_encoder", "__version__"}
    assert set(kdlib.__all__) == names and names <= set(dir(kdlib))
    namespace = {}
    exec("from kdlib import *", namespace)
    assert namespace["Study"] is Study and names <= namespace.keys()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kdlib' has no attribute 'teacher'"):
        kdlib.teacher
    with pytest.raises(ImportError):
        from kdlib import teacher  # noqa: F401


def test_import_needs_no_heavy_library():
    code = "import sys, kdlib; assert not {'torch', 'numpy', 'pydantic', 'importlib.metadata'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"])
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*kdlib.__all__} - {"__version__"}))
def test_the_example_of_a_name_runs(name):
    module = sys.modules[getattr(kdlib, name).__module__]
    [example] = [test for test in doctest.DocTestFinder().find(module) if test.name == f"{module.__name__}.{name}"]
    assert example.examples and doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


@pytest.mark.slow
def test_the_library_needs_no_package_of_the_notebooks():
    """Everything but figures, widgets and `kdlib run` works after `pip install kdlib`."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    others = [*project["optional-dependencies"]["notebooks"], "IPython"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others!r}, None))
import kdlib
from kdlib.study import export, study
from kdlib.progress import track
[getattr(kdlib, name) for name in kdlib.__all__]
list(track("ab", "letters"))
from kdlib.cli import app
app(["run", "--profile", "smoke"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("pip install 'kdlib[notebooks]'\n"), done.stderr


@pytest.mark.slow
def test_a_name_brings_only_what_it_needs():
    code = "import sys; from kdlib import load_encoder; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
