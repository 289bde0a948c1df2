"""The admin against its own OpenAPI document: what schemathesis makes of it, right and wrong, is
answered as the document says.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.rock import sync
from envs.rock.wire.operations import SANDBOX
from tests.envs.rock.service import running

pytestmark = [pytest.mark.slow, pytest.mark.live]
schemathesis = pytest.importorskip(
    "schemathesis",
    reason="schemathesis is not installed (pip install -r tests/requirements-live.txt)",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    entered = running.admin(
        tmp_path_factory.mktemp("admin"), resources=(1, 1.0, 0, 1)
    )  # room for nothing: a start is refused and leaves nothing to clean
    yield sync.run(entered.__aenter__(), 30)
    sync.run(entered.__aexit__(None, None, None), 60)


def test_every_route_answers_as_its_document_says(site):
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json").exclude(
        path=SANDBOX + "connect"
    )  # a WebSocket
    tried = set()
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(
            max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(
            operation.as_strategy(),
            (
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
                if operation.body or operation.query
                else st.none()
            ),
        )
        def attack(right, wrong):
            for case in filter(None, (right, wrong)):
                response = case.call(
                    headers=site.headers("worker" if "/worker/" in case.path else "default"),
                    timeout=60,
                )
                if (
                    response.status_code >= 500
                ):  # a refusal by its name is an answer; "internal" is a fault of ours
                    assert response.json()["error"]["code"] in (
                        "start_failed",
                        "start_timeout",
                        "busy",
                    ), response.text
                case.validate_response(
                    response,
                    checks=[
                        status_code_conformance,
                        content_type_conformance,
                        response_schema_conformance,
                    ],
                    excluded_checks=[not_a_server_error],
                )

        attack()
        tried.add(operation.path)
    assert len(tried) > 35, tried
