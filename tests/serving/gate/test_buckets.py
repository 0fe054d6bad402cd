"""Token buckets: what is had at once, what grows back, and what is owed."""

from serve.gate.budget import Bucket


def test_a_minute_s_worth_at_once_and_then_as_it_grows_back() -> None:
    bucket = Bucket(60, now=0.0)
    assert [bucket.take(20, 0.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(20, 0.0) == 20, "seconds until it is there"
    assert bucket.take(20, 19.0) == 1
    assert bucket.take(20, 20.0) == 0
    assert bucket.take(60, 1000.0) == 0
    assert bucket.take(1, 1000.0) == 1, "what nobody took in an hour is not saved up"


def test_more_than_a_full_bucket_is_had_from_a_full_one_which_owes_the_rest() -> None:
    bucket = Bucket(60, now=0.0)
    assert bucket.take(90, 0.0) == 0
    assert bucket.take(1, 0.0) == 31
    assert bucket.take(90, 30.0) == 60


def test_what_was_estimated_wrong_is_put_right() -> None:
    bucket = Bucket(60, now=0.0)
    assert bucket.take(60, 0.0) == 0
    bucket.correct(-50, 0.0)
    assert bucket.take(50, 0.0) == 0
    bucket.correct(30, 0.0)
    assert bucket.take(1, 0.0) == 31
    bucket.correct(-1000, 0.0)
    assert [bucket.take(60, 0.0), bucket.take(1, 0.0)] == [0, 1], "never more than full"
