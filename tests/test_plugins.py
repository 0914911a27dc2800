from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.main import get_group
from typer.testing import CliRunner

from dreamkit import cli, hookimpl, hookspecs, plugin
from dreamkit.errors import DuplicateEntry, PluginError, RecipeError
from dreamkit.plugins import (
    BUILTIN_PROVIDER,
    ENTRY_POINT_GROUP,
    VARIABLE,
    added_rules,
    build_registries,
    with_commands,
)
from dreamkit.recipe import read_recipe
from dreamkit.recipe.signature import documentation, option_rows, options_of
from dreamkit.registry import KINDS, PluginFailure, Registries, Registry, name_key
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.types import Event, InversionStep, Noted
from dreamkit.types.entries import BASES

ROOT = Path(__file__).resolve().parents[1]
HIGH_FREQ = ROOT / "plugins" / "high_freq.py"
EXAMPLE = ROOT / "plugins" / "dreamkit-example"
HOOKS = {
    name: ", ".join(inspect.signature(member).parameters)
    for name, member in vars(hookspecs).items()
    if inspect.isfunction(member) and hasattr(member, "dreamkit_spec")
}
ENTRY_HOOKS = sorted(name for name, arguments in HOOKS.items() if arguments == "register")

GOOD = """
from dreamkit import hookimpl

class Fine:
    "Works."

@hookimpl
def register_regularizers(register):
    register("fine", Fine)
"""

BROKEN = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def :", "SyntaxError: invalid syntax"),
    "hook_raises": (
        """
from dreamkit import hookimpl

@hookimpl
def register_regularizers(register):
    register("early", int)

@hookimpl
def register_criteria(register):
    register("early", int)
    raise RuntimeError("the cable is out")
""",
        "RuntimeError: the cable is out",
    ),
    "misspelt_hook": (
        "from dreamkit import hookimpl\n@hookimpl\ndef register_regularisers(register): ...",
        "PluginValidationError: unknown hook 'register_regularisers'",
    ),
    "wrong_argument": (
        "from dreamkit import hookimpl\n@hookimpl\ndef register_criteria(registry): ...",
        "PluginValidationError: ",
    ),
    "no_hook": (
        "def register_regularizers(register): ...",
        "PluginError: it implements none of dreamkit's hooks (is '@hookimpl' missing?)",
    ),
    "other_version": (
        'dreamkit_api = "2"\n' + GOOD,
        "PluginError: it is written for version 2 of dreamkit's plugin API, and this dreamkit has "
        "version 1: install a dreamkit that has it",
    ),
    "misspelt_need": (
        GOOD.replace("class Fine:", "class Fine(Regularizer):")
        .replace('"Works."', 'needs = frozenset({"bn_statistic"})')
        .replace("import hookimpl", "import hookimpl\nfrom dreamkit.plugin import Regularizer"),
        "TypeError: Fine.needs: nothing is called 'bn_statistic'; did you mean 'bn_statistics'?",
    ),
    "bad_name": (
        GOOD.replace('"fine"', '"Not Fine"'),
        "ValueError: regularizers name 'Not Fine'",
    ),
    "duplicate": (
        GOOD.replace('"fine"', '"tv"'),
        "DuplicateEntry: regularizers 'tv' is registered twice: by dreamkit and by ",
    ),
}


class Site:
    """A folder of installed distributions, the only ones that dreamkit sees in a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(self, name: str, code: str) -> str:
        """Install version 1.0 of a distribution with one module; return its provider's name."""
        module = name.replace("-", "_")
        self.modules.append(module)
        (self.folder / f"{module}.py").write_text(code)
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\nplugin = {module}\n")
        importlib.invalidate_caches()
        return f"{name} 1.0"

    def entry_points(self) -> list[importlib.metadata.EntryPoint]:
        """Return what is installed, as importlib.metadata reads it off the folder."""
        found = importlib.metadata.distributions(path=[str(self.folder)])
        return [point for distribution in found for point in distribution.entry_points]


@pytest.fixture(autouse=True)
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    made = Site(folder)
    everything = importlib.metadata.entry_points

    def entry_points(**wanted):
        # torch looks for entry points of its own when it is imported.
        if wanted == {"group": ENTRY_POINT_GROUP}:
            return made.entry_points()
        return everything(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.delenv(VARIABLE, raising=False)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``dreamkit ARGUMENTS``; return its exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dreamkit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stopped.value.code, out, err

    return run


def recipe_with(folder: Path, plugins: list[str], regularizer: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(
        f"""\
name: plugged
plugins: {json.dumps(plugins)}
teacher: {{source: bundled, model: digits_resnet8}}
synthesis:
  name: deepinversion
  images: 4
  regularizers:
    - {regularizer}
application: {{name: synthesize}}
"""
    )
    return file


def entries(registries: Registries) -> set[tuple[str, str, str]]:
    return {
        (kind, name, registries[kind].provider(name)) for kind in KINDS for name in registries[kind]
    }


def step_of(images: torch.Tensor) -> InversionStep:
    return InversionStep(images, torch.zeros(len(images), dtype=torch.int64), torch.zeros(1, 2))


# Every hook has a test and a description.


def test_there_is_one_hook_for_each_kind():
    assert sorted(f"register_{kind}" for kind in KINDS) == ENTRY_HOOKS
    assert HOOKS.keys() - ENTRY_HOOKS == {"register_commands", "on_event"}


@pytest.mark.parametrize("hook", ENTRY_HOOKS)
def test_hook_registers_its_entry_with_its_provenance(hook, monkeypatch):
    kind = hook.removeprefix("register_")

    class Entry(BASES.get(kind, object)):
        """An entry of a plugin."""

    @hookimpl
    def implementation(register):
        register("mine", Entry)

    Entry.__abstractmethods__ = frozenset()  # what it does is not the matter here
    module = ModuleType("dreamkit_test_plugin")
    setattr(module, hook, implementation)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    registries = build_registries([module.__name__])

    new = entries(registries) - entries(build_registries())
    assert new == {(kind, "mine", module.__name__)}
    assert registries[kind].resolve("mine") is Entry
    assert registries[kind].summary("mine") == "An entry of a plugin."
    assert registries.providers == [BUILTIN_PROVIDER, module.__name__]
    assert registries.failures == []


README = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
DOCUMENTED = re.compile(r"^\| `(\w+)\(([\w, ]*)\)` \| (.+) \|$", re.M)


def test_readme_has_a_row_for_every_hook_with_its_arguments_and_for_no_other():
    rows = {name: arguments for name, arguments, _ in DOCUMENTED.findall(README)}
    assert {name: rows[name] for name in rows if name[0].islower()} == HOOKS


def test_readme_has_a_row_for_every_event_with_its_fields_and_for_no_other():
    rows = {name: arguments for name, arguments, _ in DOCUMENTED.findall(README)}
    events = {
        event.__name__: ", ".join(field.name for field in dataclasses.fields(event))
        for event in Event.__subclasses__()
    }
    assert {name: rows[name] for name in rows if name[0].isupper()} == events


@pytest.mark.parametrize("hook", ENTRY_HOOKS)
def test_readme_names_the_base_and_an_example_of_a_hook(hook):
    (rest,) = (rest for name, _, rest in DOCUMENTED.findall(README) if name == hook)
    what, base, example, link = re.fullmatch(
        r"(.+) \| `(\w+)` \| \[`(\S+)`\]\((\S+)\)", rest
    ).groups()
    kind = hook.removeprefix("register_")
    assert what.strip()
    assert f"An entry of ``{kind}``" in getattr(plugin, base).__doc__
    cls = build_registries()[kind].resolve(example)
    assert Path(inspect.getfile(cls)).resolve() == (ROOT / "plugins" / link).resolve()


def test_readme_has_a_row_for_every_optional_member_of_a_base_and_for_no_other():
    rows = re.findall(r"^\| `(\w+)` \| ((?:`[\w(), ]+`(?:, )?)+) \| .+ \|$", README, re.M)
    told = {(base, name) for base, names in rows for name in re.findall(r"`(\w+)", names)}
    optional = {
        (base.__name__, name)
        for base in BASES.values()
        for name in vars(base).keys() - base.__abstractmethods__
        if not name.startswith("_")
    }
    assert told == optional


# Built-ins come through the same hooks.


@pytest.mark.parametrize("kind", KINDS)
def test_every_builtin_has_a_summary_a_docstring_and_readable_options(kind):
    registry = build_registries()[kind]
    assert list(registry)
    for name in registry:
        assert registry.provider(name) == BUILTIN_PROVIDER
        summary = registry.summary(name)
        cls = registry.resolve(name)
        doc = documentation(cls)
        assert summary, f"{kind} {name} has no docstring"
        assert doc.startswith(summary)
        options, told = options_of(cls), documentation(cls)
        for option in options:
            assert re.search(rf"^ *{option}: ", told, re.M), f"{kind} {name}: describe '{option}'"
        assert name_key(kind) not in options
        if kind in {"regularizers", "criteria"}:
            assert "weight" not in options, "weights belong to the recipe"


def test_build_registries_returns_a_fresh_set():
    first, second = build_registries(), build_registries()
    first["regularizers"].register("mine", int, "me")
    assert "mine" in first["regularizers"]
    assert "mine" not in second["regularizers"]


@pytest.mark.parametrize("target", ["no_such_module:Tv", "dreamkit.plugins:Nothing"])
def test_summary_of_a_reference_that_leads_nowhere_is_empty(target):
    registry = Registry("regularizers")
    registry.register("lost", target, "me")
    assert registry.summary("lost") == ""


def test_building_registries_imports_no_torch():
    code = (
        "import sys; from dreamkit.plugins import build_registries; r = build_registries();"
        "[list(k) for k in r.by_kind.values()]; sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0


# Single files and modules that a recipe names.


def test_single_file_is_loaded_with_its_path_as_provenance(monkeypatch):
    monkeypatch.chdir(ROOT)
    registries = build_registries(["plugins/high_freq.py"])
    assert registries["regularizers"].provider("high_freq") == "plugins/high_freq.py"
    summary = "Mean squared vertical second difference of the images."
    assert registries["regularizers"].summary("high_freq") == summary
    assert "high_freq" not in build_registries()["regularizers"]


def test_single_file_serves_a_recipe_and_its_regularizer_works(tmp_path):
    file = recipe_with(tmp_path, [str(HIGH_FREQ)], "{name: high_freq, weight: 0.5}")

    recipe = read_recipe(file, build_registries).recipe

    (term,) = recipe.synthesis.regularizers
    assert (term.name, term.weight) == ("high_freq", 0.5)
    # One column, four rows: second differences 0 - 2·0 + 1 = 1 and 0 - 2·1 + 0 = -2.
    images = torch.tensor([0.0, 0.0, 1.0, 0.0]).reshape(1, 1, 4, 1).requires_grad_(True)
    value = term.entry(step_of(images))
    assert value.shape == ()
    assert value.item() == 2.5  # (1 + 4) / 2
    (gradient,) = torch.autograd.grad(value, [images])
    assert gradient.flatten().tolist() == [1.0, -4.0, 5.0, -2.0]
    ramp = torch.arange(5.0).reshape(1, 1, 5, 1).expand(2, 3, 5, 4)
    assert term.entry(step_of(ramp)).item() == 0


def test_options_of_a_plugin_are_validated_with_their_place(tmp_path):
    file = recipe_with(tmp_path, [str(HIGH_FREQ)], "{name: high_freq, power: 2}")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:8:25 .*\[0\]\.power: unknown option"):
        read_recipe(file, build_registries)


def test_entry_of_a_plugin_that_is_not_named_is_unknown(tmp_path):
    file = recipe_with(tmp_path, [], "{name: high_freq}")
    with pytest.raises(RecipeError, match="no name 'high_freq' among the regularizers"):
        read_recipe(file, build_registries)


def test_plugin_named_twice_is_loaded_once():
    registries = build_registries([str(HIGH_FREQ), str(HIGH_FREQ)])
    assert registries.providers == [BUILTIN_PROVIDER, str(HIGH_FREQ)]


def test_files_of_one_name_do_not_meet(tmp_path):
    files = []
    for folder in ("one", "two"):
        file = tmp_path / folder / "plugin.py"
        file.parent.mkdir()
        file.write_text(GOOD.replace('"fine"', f'"{folder}"').replace("Works", f"From {folder}"))
        files.append(str(file))
    registry = build_registries(files)["regularizers"]
    assert registry.summary("one") == "From one."
    assert registry.summary("two") == "From two."


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_that_a_recipe_names_is_an_error(case, tmp_path):
    code, reason = BROKEN[case]
    file = tmp_path / "broken.py"
    file.write_text(code)
    recipe = recipe_with(tmp_path, [str(file)], "{name: tv}")
    with pytest.raises(PluginError) as caught:
        read_recipe(recipe, build_registries)
    place = f"{tmp_path / 'recipe.yaml'}:2:10 plugins: "
    assert caught.value.message.startswith(f"{place}plugin '{file}' cannot be loaded: {reason}")


def test_an_entry_that_cannot_be_imported_does_not_hide_what_another_is_called():
    registries = build_registries()
    registry = registries["quantizers"]
    registry.register("a_broken_one", "gone_module:Gone", "plugin x")
    registry.entries = dict(sorted(registry.entries.items()))  # it comes first
    rows = option_rows(registries["applications"].resolve("quantize"), registries)
    assert {row.name: row.default for row in rows}["quantizer"] == "onnxruntime"


def test_missing_plugin_is_an_error_that_names_where_it_was_sought(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=re.escape(str(tmp_path / "gone.py"))):
        build_registries(["gone.py"])
    with pytest.raises(PluginError, match="No module named 'gone_module'"):
        build_registries(["gone_module"])


def test_broken_plugin_on_the_command_line_is_one_message_and_status_2(command, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module")
    status, out, err = command("list", "--plugin", str(file))
    assert (status, out) == (2, "")
    assert err.startswith(f"error: plugin '{file}' cannot be loaded: ModuleNotFoundError")


# Installed distributions.


def test_installed_plugin_is_loaded_with_its_distribution_as_provenance(site):
    provider = site.install("dk-good", GOOD)
    registries = build_registries()
    assert provider == "dk-good 1.0"
    assert ("regularizers", "fine", provider) in entries(registries)
    assert registries.providers == [BUILTIN_PROVIDER, provider]
    assert registries.failures == []


@pytest.mark.parametrize("case", BROKEN)
def test_broken_installed_plugin_is_named_and_left_out_and_others_go_on(case, site):
    builtin = entries(build_registries())
    code, reason = BROKEN[case]
    # Entry points are sorted: one good plugin is loaded before the broken one, one after.
    before = site.install("dk-a-good", GOOD.replace('"fine"', '"before"'))
    broken = site.install("dk-broken", code)
    after = site.install("dk-z-good", GOOD.replace('"fine"', '"after"'))

    registries = build_registries()

    (failure,) = registries.failures
    assert failure.plugin == broken
    assert failure.reason.startswith(reason)
    good = {("regularizers", "before", before), ("regularizers", "after", after)}
    assert entries(registries) == builtin | good
    assert registries.providers == [BUILTIN_PROVIDER, before, after]


def test_list_warns_of_a_broken_plugin_and_goes_on(site, command):
    broken = site.install("dk-broken", BROKEN["hook_raises"][0])
    status, out, err = command("list", "regularizers", "--json")
    assert status == 0
    assert err == f"warning: plugin {broken} is left out: RuntimeError: the cable is out\n"
    names = [row["name"] for row in json.loads(out)]
    assert "tv" in names
    assert "early" not in names


def test_plugins_command_lists_providers_and_failures(site, command):
    good = site.install("dk-good", GOOD)
    hears = site.install("dk-hears", "HEARD = []\n" + LISTENING)
    broken = site.install("dk-broken", "import no_such_module")
    status, out, _ = command("plugins", "--json")
    assert status == 0
    rows = {row["provider"]: (row["status"], row["entries"]) for row in json.loads(out)}
    assert set(rows) == {BUILTIN_PROVIDER, good, hears, broken}
    assert rows[good] == ("loaded", "regularizers: fine")
    assert rows[hears] == ("loaded", "hears of events")
    assert rows[broken][0] == "failed"
    assert "no_such_module" in rows[broken][1]


def test_recipe_that_asks_for_an_entry_of_a_broken_plugin_hears_of_it(site, tmp_path):
    broken = site.install("dk-broken", BROKEN["hook_raises"][0])
    file = recipe_with(tmp_path, [], "{name: early}")
    expected = re.escape(f"plugins that failed to load: {broken} (RuntimeError: the cable is out)")
    with pytest.raises(RecipeError, match=expected):
        read_recipe(file, build_registries)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ('"no_such:Fine"', "cannot be loaded from no_such:Fine: ModuleNotFoundError: No module"),
        (
            "Fine",
            "is unusable: Fine has no '__call__', 'needs': derive it from dreamkit",
        ),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_with_its_place(site, tmp_path, target, message):
    provider = site.install("dk-odd", GOOD.replace('"fine", Fine', f'"fine", {target}'))
    file = recipe_with(tmp_path, [], "{name: fine}")
    with pytest.raises(RecipeError) as caught:
        read_recipe(file, build_registries)
    place = f"{file}:8:14 synthesis.regularizers[0].name: "
    assert caught.value.message.startswith(f"{place}regularizers 'fine' of {provider} {message}")


# Names are never overwritten.


def test_duplicate_name_raises_and_names_both_providers():
    registry = Registry("regularizers")
    registry.register("tv", TotalVariation, "the first 1.0")
    with pytest.raises(DuplicateEntry) as caught:
        registry.register("tv", float, "the second 2.0")
    message = "regularizers 'tv' is registered twice: by the first 1.0 and by the second 2.0"
    assert caught.value.message == message
    assert registry.resolve("tv") is TotalVariation
    assert registry.provider("tv") == "the first 1.0"


RULES = """
from dreamkit import hookimpl

class Broken:
    targets = ()

    def __init__(self):
        raise KeyError("the rule's own table")

    def follow(self, call):
        return None

class Fine(Broken):
    def __init__(self):
        pass

@hookimpl
def register_channel_rules(register):
    register("broken", Broken)
    register("elsewhere", "no_such_module:Rule")
    register("fine", Fine)
"""


def test_a_channel_rule_that_fails_is_named_and_left_out_and_the_rest_go_on(site):
    provider = site.install("dk-rules", RULES)
    registries, notes = build_registries(), []
    assert [type(rule).__name__ for rule in added_rules(registries, notes.append)] == ["Fine"]
    assert [failure.plugin for failure in registries.failures] == [provider, provider]
    assert notes[0].startswith(
        f"the channel rule 'broken' of {provider} cannot be used: KeyError: \"the rule's own table"
    )
    assert "'elsewhere'" in notes[1]


def test_the_channel_rules_of_a_plugin_that_the_recipe_names_must_load(site):
    site.install("dk-rules", RULES)
    with pytest.raises(PluginError, match=r"channel rule 'broken' of dk-rules 1\.0 cannot be used"):
        added_rules(build_registries(["dk_rules"]))


def test_second_installed_plugin_with_a_taken_name_is_a_failure(site):
    first = site.install("dk-first", GOOD)
    second = site.install("dk-second", GOOD)
    registries = build_registries()
    assert registries["regularizers"].provider("fine") == first
    reason = f"DuplicateEntry: regularizers 'fine' is registered twice: by {first} and by {second}"
    assert registries.failures == [PluginFailure(second, reason)]


@pytest.mark.parametrize("name", ["", "Upper", "two words", "-dash", "naïve", "a/b"])
def test_names_are_lower_case_words(name):
    with pytest.raises(ValueError, match="use lower-case letters"):
        Registry("regularizers").register(name, int, "me")


# Which installed plugins are loaded.


def test_the_environment_says_which_installed_plugins_are_loaded(site, monkeypatch):
    one = site.install("dk-one", GOOD.replace('"fine"', '"one"'))
    two = site.install("dk-two", GOOD.replace('"fine"', '"two"'))
    assert build_registries().providers == [BUILTIN_PROVIDER, one, two]
    for chosen, loaded in (
        ("", []),
        (" ", []),
        ("dk-two", [two]),
        ("dk-two, dk-one", [one, two]),
        ("plugin", [one, two]),  # what the entry points are called
    ):
        monkeypatch.setenv(VARIABLE, chosen)
        assert build_registries().providers == [BUILTIN_PROVIDER, *loaded]
    monkeypatch.setenv(VARIABLE, "")
    named = build_registries(["dk_two"])  # what a recipe names is loaded all the same
    assert named.providers == [BUILTIN_PROVIDER, "dk_two"]


def test_a_plugin_that_the_environment_names_must_be_installed(site, monkeypatch, command):
    site.install("dk-one", GOOD)
    monkeypatch.setenv(VARIABLE, "dk-oen")
    status, out, err = command("plugins")
    assert (status, out) == (2, "")
    assert err == (
        f"error: {VARIABLE}: no plugin 'dk-oen' is installed; did you mean 'dk-one'? "
        "(installed: dk-one, plugin)\n"
    )


def test_a_broken_plugin_that_is_not_chosen_is_not_touched(site, monkeypatch):
    site.install("dk-broken", BROKEN["import"][0])
    monkeypatch.setenv(VARIABLE, "")
    assert build_registries().failures == []


# Events.

LISTENING = """
from dreamkit import hookimpl

@hookimpl
def on_event(event):
    HEARD.append(event)
    if event.text == FAILS:
        raise RuntimeError(event.text)
"""


def test_every_plugin_hears_of_events_and_one_that_fails_is_left_out(site, monkeypatch):
    heard: list[Event] = []
    for name, fails in (("dk-a", "one"), ("dk-b", "none")):
        site.install(name, f"FAILS = {fails!r}\nHEARD = []\n{LISTENING}")
    registries = build_registries()
    for name in ("dk_a", "dk_b"):
        monkeypatch.setattr(sys.modules[name], "HEARD", heard)
    assert [provider for provider, _ in registries.listeners] == ["dk-a 1.0", "dk-b 1.0"]
    notes: list[str] = []
    events = registries.events(notes.append)
    for text in ("one", "two"):
        events.emit(Noted(text=text))
    assert [event.text for event in heard] == ["one", "one", "two"]
    assert notes == ["the plugin dk-a 1.0 failed and is left out from here on: RuntimeError: one"]
    registries.events(notes.append).emit(Noted(text="two"))  # another run begins with all of them
    assert len(heard) == 5


def test_a_hook_may_leave_out_arguments(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text("from dreamkit import hookimpl\n@hookimpl\ndef on_event(): raise ValueError")
    notes: list[str] = []
    build_registries([str(file)]).events(notes.append).emit(Noted(text="x"))
    assert notes == [f"the plugin {file} failed and is left out from here on: ValueError"]


def test_a_broken_plugin_hears_of_nothing(site):
    site.install("dk-broken", "HEARD = []\n" + LISTENING + BROKEN["hook_raises"][0])
    registries = build_registries()
    assert len(registries.failures) == 1
    assert registries.listeners == []


# Commands.

COMMAND = """
from dreamkit import hookimpl

@hookimpl
def register_commands(app):
    @app.command()
    def hello_there():
        "Greet."
        print("hello")

    OTHER
"""


def test_commands_of_plugins_are_added_to_those_of_the_program(site):
    good = COMMAND.replace("OTHER", "app.add_typer(__import__('typer').Typer(), name='group')")
    site.install("dk-good", good)
    taken = site.install("dk-taken", COMMAND.replace("OTHER", 'app.command("validate")(print)'))
    broken = site.install("dk-wrong", COMMAND.replace("OTHER", "raise RuntimeError('no')"))
    before = set(get_group(cli.app).commands)

    app, failures = with_commands(cli.app)

    assert set(get_group(app).commands) - before == {"hello-there", "group"}
    assert set(get_group(cli.app).commands) == before  # the program's own is left as it is
    assert failures == [
        PluginFailure(taken, "DuplicateEntry: there is a command 'hello-there' already"),
        PluginFailure(broken, "RuntimeError: no"),
    ]
    done = CliRunner().invoke(app, ["hello-there"])
    assert (done.exit_code, done.output) == (0, "hello\n")


def test_a_plugin_cannot_replace_a_command(site):
    provider = site.install("dk-taken", COMMAND.replace("OTHER", 'app.command("validate")(print)'))
    app, failures = with_commands(cli.app)
    assert set(get_group(app).commands) == set(get_group(cli.app).commands)
    reason = "DuplicateEntry: there is a command 'validate' already"
    assert failures == [PluginFailure(provider, reason)]


# The example, as a user installs it.


@pytest.mark.slow
def test_example_distribution_installs_and_serves_a_recipe(tmp_path):
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed, and the example is built without network")
    # Building leaves folders behind, so a copy is built.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(EXAMPLE, tmp_path / "source", ignore=ignored)
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    offline = ["--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    installed = subprocess.run([*pip, *offline], capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stdout + installed.stderr

    def dreamkit(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dreamkit", *arguments],
            env=os.environ | {"PYTHONPATH": str(target)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    rows = {(row["kind"], row["name"]): row for row in json.loads(dreamkit("list", "--json"))}
    for entry in (("regularizers", "color_balance"), ("criteria", "weight_std")):
        assert rows[entry]["provider"] == "dreamkit-example 0.1.0"
        assert rows[entry]["summary"]

    file = recipe_with(tmp_path, [], "{name: color_balance, weight: 0.1, power: 1}")
    criteria = "application: {name: prune, criteria: [{name: weight_std}], target: {flops: 0.5}}"
    file.write_text(file.read_text().replace("application: {name: synthesize}", criteria))
    assert "color_balance" in file.read_text()
    assert "weight_std" in file.read_text()
    assert dreamkit("validate", file.name) == f"{file.name} is valid\n"


def test_entries_are_listed_without_what_they_import():
    code = (
        "import sys; from dreamkit.plugins import build_registries; r = build_registries(); "
        "assert all(k.summary(n) for k in r.by_kind.values() for n in k); "
        "sys.exit(' '.join({'torch', 'torchvision'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "DREAMKIT_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert not done.stderr.strip(), done.stderr
