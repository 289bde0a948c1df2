"""The probe that real engines of the tiny model are proven by, and what it must answer."""

from tests.rome.serve.tiny import Oracle, make_config

PROBE = list(range(20, 50))


def expected(params):
    return [0.0, *Oracle(make_config(), params).logprobs(PROBE)]
