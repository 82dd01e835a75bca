"""``dqar workbook`` over notebooks that fail, vanish or repeat themselves, and what it shows of their results."""

import base64
import io
import types

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from dqar import workbook
from dqar.figures import notebook as start
from dqar.figures.gallery import code_of
from dqar.measure.results import PACKAGE

PARAMETERS = 'profile = "smoke"\nseed = 0\nout = None'


def write_notebook(path, *code, kernel="python3", markdown=()):
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_markdown_cell(text) for text in markdown]
    cells += [text if isinstance(text, dict) else new_code_cell(text) for text in code]
    spec = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(workbook.choose, "__defaults__", (folder, True))
    return folder


def test_a_broken_notebook_is_one_failed_row_while_the_others_run(notebooks, tmp_path, capfd):
    write_notebook(notebooks / "01_dies.ipynb", "import os\nos._exit(1)")
    write_notebook(notebooks / "02_missing.ipynb", "1", kernel="cobol")
    (notebooks / "03_damaged.ipynb").write_text('{"cells": [')
    write_notebook(notebooks / "04_good.ipynb", "1")
    copies = tmp_path / "out/notebooks"
    copies.mkdir(parents=True)
    write_notebook(notebooks / "05_copy.ipynb", "1")
    (copies / "05_copy.ipynb").write_text("{")
    assert workbook.main(["--profile", "smoke", "--out", str(tmp_path / "out")]) == 1
    said = capfd.readouterr()
    printed = " ".join(said.out.split())
    assert "01_dies.ipynb: its kernel died" in printed
    assert "02_missing.ipynb: its kernel 'cobol' isn't installed" in printed
    assert "03_damaged.ipynb: Notebook does not appear to be JSON" in printed
    assert f"its executed copy {copies / '05_copy.ipynb'} is damaged: remove it and run again" in printed
    assert printed.count("│ failed") == 4 and "│ 04_good │ done" in printed
    assert "WARNING" not in said.err


def test_a_lost_page_is_made_again_and_outputs_are_no_change(notebooks, tmp_path, capsys):
    path = write_notebook(notebooks / "01_one.ipynb", "1 + 1")
    arguments = ["--profile", "smoke", "--out", str(tmp_path / "out"), "--show"]
    assert workbook.main(arguments) == 0
    page, shown = tmp_path / "out/notebooks/01_one.html", path.read_bytes()
    assert b'"2"' in shown
    page.unlink()
    assert workbook.main(arguments) == 0
    assert "kept" in capsys.readouterr().out and page.exists() and path.read_bytes() == shown


def test_notebooks_are_chosen_by_number_by_word_and_by_slide():
    def names(only):
        return [path.stem for path in workbook.choose(only)]

    assert names("trace") == names("01") == names("01_trace") == ["01_trace"]
    assert names("quantized, 01,trace") == ["04_quantized_cache", "01_trace"]
    everything = workbook.choose(None)
    assert [path.stem for path in workbook.of_slide(14, everything)] == ["01_trace"]
    drawn = {slide: workbook.of_slide(slide, everything) for slide in range(4, 18)}
    assert all(len(paths) == 1 for paths in drawn.values())
    with pytest.raises(ValueError, match=r"--slide 3 is not accepted: these notebooks draw slides 4, 5, .* 17"):
        workbook.of_slide(3, everything)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-p", "profil", "smoke"], "parameter 'profil' is unknown: notebooks take profile, seed, out"),
        (["-p", "seed", "few"], "argument --seed: invalid int value: 'few'"),
        (["-p", "profile", "smok"], "profile 'smok' is unknown: choose one of smoke, "),
        (["--slide", "3"], "--slide 3 is not accepted"),
        (["--slide", "14", "--only", "01"], "argument --only: not allowed with argument --slide"),
    ],
)
def test_wrong_parameters_are_named_and_nothing_runs(arguments, message, capsys, tmp_path):
    assert workbook.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"dqar workbook: {message}") and not (tmp_path / "out").exists()


def test_papermills_own_command_stops_at_an_unknown_parameter(tmp_path, monkeypatch):
    """It hands a misspelt parameter on in silence; the notebook's first line must not."""
    path, given = write_notebook(tmp_path / "a.ipynb", "begin(profile, seed, out)"), {"profil": "smoke"}
    prepared = papermill.execute_notebook(path, tmp_path / "b.ipynb", given, prepare_only=True)
    shell = types.SimpleNamespace(user_ns={"In": ["", *(cell.source for cell in prepared.cells)]})
    monkeypatch.setattr(start, "get_ipython", lambda: shell)
    with pytest.raises(ValueError, match="parameter 'profil' is unknown: notebooks take profile, seed, out"):
        start.begin("smoke", 0, tmp_path)
    assert not (tmp_path / "results").exists()


def test_bars_are_silent_where_nobody_watches_and_results_have_one_store(tmp_path):
    code = "from dqar.figures.notebook import begin\nbegin(profile, seed, out)\nfrom tqdm.auto import tqdm\n"
    path = write_notebook(tmp_path / "a.ipynb", code + "print(sum(tqdm(range(3))))")
    done = papermill.execute_notebook(
        path,
        tmp_path / "b.ipynb",
        {"out": str(tmp_path)},
        progress_bar=False,
        config=workbook.by_sockets(str(tmp_path)),
    )
    assert [output.text for output in done.cells[-1].outputs] == ["3\n"]
    assert start.store("digits") == PACKAGE.parent / "out/digits"
    with pytest.raises(ValueError, match="seed='1' is not accepted: an int"):
        start.begin("smoke", "1", tmp_path)


def test_injected_names_are_those_of_papermills_cell():
    cells = ["x = 1", '# Parameters\nprofil = "smoke"\nseed = 3\n', "y = 2"]
    assert start.injected(cells) == ["profil", "seed"] and start.injected(["x = 1"]) == []


def uncompressed(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=0)
    return file.getvalue()


def png(color, size=(4, 3)):
    return base64.b64encode(uncompressed(Image.new("RGB", size, color))).decode()


def pictures(cell):
    datas = [output.get("data", {}) for output in cell.outputs]
    return [base64.b64decode(data["image/png"]) for data in datas if "image/png" in data]


def executed(path, *outputs):
    copy = nbformat.read(path, as_version=4)
    copy.cells[1].outputs = list(outputs)
    return copy


def test_only_what_a_notebook_found_is_shown_and_a_second_showing_changes_nothing(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "1")
    outputs = (
        new_output("stream", name="stderr", text="a bar: 100%"),
        new_output("stream", name="stdout", text="one\n"),
        new_output("stream", name="stdout", text="two\n"),
        new_output("execute_result", {"text/plain": "4"}, execution_count=17, metadata={"at": "19:00"}),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "8f"}, "text/plain": "w"}),
        new_output("display_data", {"text/markdown": "**5**", "text/plain": "<Markdown object at 0x7f>"}),
        new_output("display_data", {"image/png": png("red"), "text/plain": "<Figure>"}),
    )
    assert workbook.show_results(executed(path, *outputs), path)
    cell = nbformat.read(path, as_version=4).cells[1]
    assert cell.execution_count is None
    assert [output.get("text") or output.data.get("text/plain") for output in cell.outputs] == [
        *("one\ntwo\n", "4", "**5**", "<Figure>")
    ]
    assert all(output.get("metadata", {}) == {} for output in cell.outputs)
    before = path.read_bytes()
    assert not workbook.show_results(executed(path, *outputs), path) and path.read_bytes() == before
    again = new_output("display_data", {"image/png": png("red", (4, 4)), "text/plain": "<Figure>"})
    assert workbook.show_results(executed(path, *outputs[:-1], again), path) and path.read_bytes() != before


def test_times_are_not_shown(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", new_code_cell("2", metadata={"tags": [workbook.LIVE]}))
    assert not workbook.show_results(executed(path, new_output("display_data", {"text/plain": "12 s"})), path)


def test_a_page_needs_no_network(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", markdown=["Let $s=\\max\\lvert x\\rvert/Q$; a `$` in code, 5 $."])
    workbook.write_html(nbformat.read(path, as_version=4), tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text()
    assert "<math" in html and "<mi>Q</mi>" in html and "lvert" not in html
    assert "<script src=" not in html and "MathJax.js" not in html and "<code>$</code>" in html


def test_committed_notebooks_show_their_results(monkeypatch):
    """Whoever reads them on a code-hosting site sees what was found; ``dqar workbook --show`` puts it there."""
    monkeypatch.setattr(workbook, "with_palette", uncompressed)  # in place of making every picture small once more
    for path in workbook.choose(None):
        notebook = nbformat.read(path, as_version=4)
        assert nbformat.writes(notebook) + "\n" == path.read_text(), path
        assert path.stat().st_size < 1_000_000, path
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            shown = workbook.presentable(cell.outputs, cell.outputs, workbook.LIVE in cell.metadata.get("tags", []))
            assert all(Image.open(io.BytesIO(picture)).mode == "P" for picture in pictures(cell)), path
            assert shown == cell.outputs and cell.execution_count is None, f"{path}: run `dqar workbook --show`"
        answer = notebook.cells[-1]
        assert answer.source.startswith("shows("), path
        assert answer.outputs, f"{path} shows no answer: run `dqar workbook --show`"
        for said in (output.data["text/markdown"] for output in answer.outputs):
            assert said.startswith("## What this shows") and any(sign.isdigit() for sign in said), path


def test_every_notebook_asks_offers_something_to_try_and_answers():
    for path in workbook.choose(None):
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert "**Question:**" in text and "## Try this" in text and "**How to read this.**" in text, path
        assert "begin(profile, seed, out)" in code_of(path), path


def test_jupyterlab_is_told_from_a_headless_run(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not start.is_watched()
    monkeypatch.setenv("JPY_SESSION_NAME", "/work/02_gate.ipynb")
    assert start.is_watched()
