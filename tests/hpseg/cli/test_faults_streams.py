"""Standard streams that are closed, full or read by nobody."""

from __future__ import annotations

import os
import sys
from functools import partial

from PIL import Image
from processes import in_child, needs_fork
from runs import train_words
from safetensors.torch import load_file

from hpseg.cli.main import main
from hpseg.run.folder import load_state


class Unread:
    """A stream that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = fileno = lambda self: self.write("")

    def isatty(self):
        return True  # so that bars are drawn, too


def test_a_run_goes_on_when_nobody_reads_its_messages(photos, vit_file, tmp_path, monkeypatch, tally):
    monkeypatch.setattr(sys, "stderr", Unread())
    assert main(train_words(photos, tmp_path / "run", vit_file)) == 0
    assert (tmp_path / "run" / "results.json").is_file()
    tally("streams that nobody reads")


@needs_fork
def test_streams_that_are_closed_or_full(photos, vit_file, run, tmp_path, tally):
    """Without the three standard streams no file of a run gets one of their numbers; a result that cannot be printed is
    an error, or the end of a pipe."""

    def closed():
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None
        status = main(train_words(photos, tmp_path / "run", vit_file))
        os.write(1, b"x"), os.write(2, b"x")
        raise SystemExit(status)

    def show_to(stream):
        def work():
            sys.stdout = stream()
            raise SystemExit(main(["show", str(run), str(photos), "--out", str(tmp_path / "a.png"), "--overwrite"]))

        return work

    works = [closed, show_to(Unread), show_to(partial(open, "/dev/full", "w"))]
    found = [os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) for work in works]
    assert found == [0, 141, 1]
    load_file(tmp_path / "run" / "model.safetensors"), load_state(tmp_path / "run" / "state.pt")
    assert Image.open(tmp_path / "a.png").size[0] > 0
    tally("streams that nobody reads", 3)
