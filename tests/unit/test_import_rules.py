"""Who may import whom in the house, read from the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import modelfleet
import pytest

PACKAGE = Path(modelfleet.__file__).parent
REPOSITORY = PACKAGE.parents[1]
SERVICES = ("tokenizer", "inference", "manager")
TRANSPORT = ("grpc", "google.rpc", "modelfleet.api")
# Files of a service that know protobuf: wiring, translation of what arrives, translation of what is sent.
TRANSLATES = re.compile(
    r"__main__\.py|servicers/\w+\.py|(\w+_)?servicer\.py|\w+_client\.py|oip_(tensors|parameters)\.py"
)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also where it takes names from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write imports in full"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def taken(directory: Path, *packages: str) -> dict[str, set[str]]:
    """What the files under a directory import of some packages; files that import nothing of them are left out."""
    wanted = re.compile("|".join(rf"{re.escape(package)}(\.|$)" for package in packages))
    found = {
        path.relative_to(directory).as_posix(): {name for name in imports(path) if wanted.match(name)}
        for path in sorted(directory.rglob("*.py"))
    }
    return {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_each_other(service: str) -> None:
    others = [f"modelfleet.{other}" for other in SERVICES if other != service]

    assert taken(PACKAGE / service, *others, "modelfleet_tools") == {}


@pytest.mark.parametrize("package", ["bundle", "runtime", "client"])
def test_what_services_share_imports_no_service(package: str) -> None:
    services = [f"modelfleet.{service}" for service in SERVICES]

    assert taken(PACKAGE / package, *services, "modelfleet_tools") == {}


def test_tools_use_clients_and_bundles_and_import_no_service() -> None:
    services = [f"modelfleet.{service}" for service in SERVICES]

    assert taken(REPOSITORY / "tools", *services) == {}


def test_bundles_know_nothing_of_grpc() -> None:
    assert taken(PACKAGE / "bundle", *TRANSPORT, "modelfleet.client") == {}


@pytest.mark.parametrize("service", SERVICES)
def test_only_wiring_and_translation_know_grpc(service: str) -> None:
    domain = {
        path: names for path, names in taken(PACKAGE / service, *TRANSPORT).items() if not TRANSLATES.fullmatch(path)
    }

    assert domain == {}


def test_the_errors_import_the_standard_library_alone() -> None:
    roots = {name.partition(".")[0] for name in imports(PACKAGE / "runtime" / "errors.py")}

    assert roots <= sys.stdlib_module_names


def test_the_bare_client_needs_no_extra() -> None:
    extras = ["pydantic", "pydantic_settings", "structlog", "prometheus_client", "uvloop", "tokenizers", "sqlalchemy"]
    code = f"import sys, modelfleet.client; print([name for name in {extras} if name in sys.modules])"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert shown.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import grpc.aio", {"grpc.aio"}),
        ("from modelfleet import manager", {"modelfleet.manager"}),
        ("def f():\n    from modelfleet.manager import registry", {"modelfleet.manager.registry"}),
        ("if TYPE_CHECKING:\n    import modelfleet.api.x as y", {"modelfleet.api.x"}),
    ],
)
def test_the_rules_see_every_way_to_import(tmp_path: Path, source: str, expected: set[str]) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)

    assert imports(path) == expected
    assert taken(tmp_path, *[name.rpartition(".")[0] or name for name in expected])
