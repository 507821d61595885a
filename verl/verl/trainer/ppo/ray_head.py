"""The head of a Ray cluster: where it is, and whether it answers."""

from __future__ import annotations

import grpc
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveReply, CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

ANSWER_TIMEOUT_S = 10.0

REFUSALS = {
    grpc.StatusCode.UNAVAILABLE: "nothing that is a Ray head answers there",
    grpc.StatusCode.DEADLINE_EXCEEDED: f"no answer from there within {ANSWER_TIMEOUT_S:g} s",
    grpc.StatusCode.UNIMPLEMENTED: "what answers there is a process of Ray or another gRPC service, but no head",
    grpc.StatusCode.UNAUTHENTICATED: (
        "the head there wants another token than this process has; copy its ~/.ray/auth_token (or set RAY_AUTH_TOKEN) "
        "and set RAY_AUTH_MODE=token"
    ),
}


def find_head(address: str) -> str:
    """`HOST:PORT` of the head that Ray takes `address` for: itself, or with `auto` the one that runs on this machine.

    Ray reaches `127.0.0.1` and `localhost` by the machine's other address, where something else may listen.

    Raises:
        ConnectionError: there is none.
        ValueError: `address` is none.
    """
    if address == "auto":
        # As `ray.init` does: a cluster that `ray start` started has a token where there was one.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    if (head := canonicalize_bootstrap_address(address)) is None:
        raise ValueError(f"{address!r} names no cluster")
    return head


def check_head(address: str) -> None:
    """Raise a `ConnectionError` unless a head of this version of Ray answers at `HOST:PORT`, and takes our token.

    Ray itself takes every gRPC server for a head that is late: it asks one that is none 20 times, and where the
    listener went away meanwhile, each time for 41 s.
    """
    try:
        reply = _ask(address)
    except grpc.RpcError as error:
        raise ConnectionError(f"{address}: {REFUSALS.get(error.code(), error.details())}") from None
    except AuthenticationError as error:
        raise ConnectionError(f"{address}: {error.message}") from None
    if reply.ray_version != ray.__version__:
        raise ConnectionError(f"{address}: the head there runs Ray {reply.ray_version}, this process {ray.__version__}")


def _ask(address: str) -> CheckAliveReply:
    """Ray's own question to a head, which no other process of a cluster can answer."""
    channel = init_grpc_channel(address)
    try:
        return NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_TIMEOUT_S)
    finally:
        channel.close()
