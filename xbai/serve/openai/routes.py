"""All of OpenAI's routes that a policy service answers."""

from __future__ import annotations

from xbai.calibration import ScoreChance
from xbai.serve.app import Service
from xbai.serve.engine_thread import EngineThread
from xbai.serve.openai.chat import add_chat_route
from xbai.serve.openai.desk import Desk
from xbai.serve.openai.models import add_model_routes
from xbai.serve.openai.responses import add_responses_route
from xbai.serve.options import OpenAIOptions

OPENAI_ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/models")


def add_openai_routes(
    service: Service, thread: EngineThread, options: OpenAIOptions, name: str, own_chance: ScoreChance | None
) -> None:
    """Add them.

    Args:
        name: what clients call the model, where the options do not say.
        own_chance: of the calibration beside it.

    Raises:
        UserError: options that the model cannot follow.
    """
    desk = Desk(service, thread, options, name, own_chance)
    add_chat_route(desk)
    add_responses_route(desk)
    add_model_routes(desk)
