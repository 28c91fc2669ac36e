"""What evaluators say of how far they are, through a real cluster."""

import pytest
import ray

from ray_tasks.evaluators import progress


class Measuring:
    def tell(self, ticket, *shares, every=0.0):
        progress.EVERY = every
        tell = progress.teller(ticket)
        for share in shares:
            tell(share)


@pytest.mark.slow
def test_an_evaluator_s_last_word_is_heard_of_the_assignment_that_it_is_about(local_ray):
    actor = ray.remote(num_cpus=0)(Measuring).remote()
    assert progress.share_of(actor, "7") is None
    ray.get(actor.tell.remote("7", 0.125, 0.25))
    assert progress.share_of(actor, "7") == 0.25
    assert progress.share_of(actor, "8") is None
    ray.get(actor.tell.remote("8", 0.5, every=1e9))  # too short to speak of
    assert progress.share_of(actor, "8") is None
    progress.forget(actor)
    assert progress.share_of(actor, "7") is None
    ray.kill(actor)


def test_outside_of_an_actor_nothing_is_said_and_no_ray_is_started():
    before = ray.is_initialized()
    assert progress.teller("7")(0.5) is None
    assert ray.is_initialized() == before
