"""Clients for a running Espalier server: gRPC and HTTP, blocking and asynchronous, with typed answers.

from clients import Client

with Client("localhost:8001") as client:
    print(client.ask("wake me at seven").to_dict())
"""

from clients.client import AsyncClient, Client
from clients.protocol import Item
from clients.results import Answer, Answers, Classification, Regression, Span, Tagging, TokenTag
from espalier.contract import HeadInfo
from espalier.errors import DeadlineError, RequestError, UnavailableError, UnknownTaskError

__all__ = [
    "Answer",
    "Answers",
    "AsyncClient",
    "Classification",
    "Client",
    "DeadlineError",
    "HeadInfo",
    "Item",
    "Regression",
    "RequestError",
    "Span",
    "Tagging",
    "TokenTag",
    "UnavailableError",
    "UnknownTaskError",
]
