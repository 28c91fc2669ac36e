import logging
import sys
import warnings

from ray_tasks.evaluators.candidate_log import MOST, kept_output


def test_what_is_printed_logged_is_kept_and_still_shown(capsys):
    before = list(logging.getLogger().handlers)
    with kept_output() as output:
        print("printed")
        print("complained", file=sys.stderr)
        logging.getLogger("some.library").error("logged")
        kept = output()
    assert all(word in kept for word in ("printed", "complained", "ERROR some.library: logged"))
    assert "printed" in "".join(capsys.readouterr())
    assert logging.getLogger().handlers == before
    with kept_output() as output:
        print("x" * (2 * MOST) + "end")
    assert len(output()) == MOST
    assert output().endswith("end\n")


def test_every_candidate_has_its_own_warnings():
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        for _ in range(2):
            with kept_output():
                for _ in range(3):
                    warnings.warn("once a candidate", stacklevel=1)
    assert len(given) == 2
