"""The zserve client: needs grpcio, protobuf and pillow, but neither torch nor the server.

from zserve import ZImageClient

with ZImageClient("localhost:8001") as client:
    drawing = client.draw("a red circle on a white background", seed=7)
    drawing.images[0].save("circle.png")
"""

from client.calls import AsyncZImageClient, ZImageClient
from client.messages import Drawing, GeneratedImage, GenerationFailedError, ImageRequest

__all__ = [
    "AsyncZImageClient",
    "Drawing",
    "GeneratedImage",
    "GenerationFailedError",
    "ImageRequest",
    "ZImageClient",
]
