"""How a gRPC channel to Triton is set up, by the clients and by the wiring."""

import tritonclient.grpc

CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", tritonclient.grpc.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", tritonclient.grpc.MAX_GRPC_MESSAGE_SIZE),
    # gRPC waits up to two minutes before it connects again, and fails every call until then: no use to a retry.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
