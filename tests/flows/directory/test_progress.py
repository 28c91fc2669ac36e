from io import StringIO

from rich.console import Console

from flows.directory.progress import Display


def test_what_is_shown_is_not_read_as_markup():
    """Paths and names of tensors may hold square brackets; `[/x]` would even end the run."""
    text = StringIO()
    display = Display(Console(file=text, width=200))
    with display.phase("models/[/x]/[red]"):
        display.say("data[0]/[/b]")
        display.note("'[bold]' is only in the base")
        with display.bar("[/]", 3) as bar:
            bar.advance()
    assert "models/[/x]/[red]\ndata[0]/[/b]\n  note: '[bold]' is only in the base\n" in text.getvalue()
