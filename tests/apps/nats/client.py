"""A program that uses NATS and knows nothing of litemesh: `client.py serve` on one node, `client.py use` on the other."""

import asyncio
import os
import sys

import nats
from nats.js.api import KeyValueConfig, Placement, StreamConfig


async def connect():
    env = os.environ
    return await nats.connect(env["NATS_URL"], user=env["NATS_USER"], password=env["NATS_PASSWORD"])


async def serve():
    connection = await connect()
    done = asyncio.Event()

    async def answer(message):
        await message.respond(b"hello " + message.data)
        if message.data == b"enough":
            done.set()

    await connection.subscribe("greet", cb=answer)
    await connection.flush()
    print("serving", flush=True)
    await done.wait()
    await connection.drain()


async def made(make, config):
    """A node that has just joined is no place for streams for a moment."""
    for _ in range(100):
        try:
            return await make(config)
        except nats.js.errors.APIError as error:
            print(error, file=sys.stderr)
            await asyncio.sleep(0.3)
    sys.exit("it is not made")


async def use(node):
    connection = await connect()
    print((await connection.request("greet", b"python", timeout=30)).data.decode())
    streams = connection.jetstream(timeout=30)
    placement = Placement(tags=[f"node:{node}"])
    await made(streams.add_stream, StreamConfig(name="ORDERS", subjects=["orders.*"], placement=placement))
    for number in range(3):
        await streams.publish(f"orders.{number}", str(number).encode())
    subscription = await streams.pull_subscribe("orders.*", durable="reader")
    for message in await subscription.fetch(3, timeout=30):
        print(message.subject, message.data.decode())
        await message.ack()
    bucket = await made(streams.create_key_value, KeyValueConfig(bucket="settings", placement=placement))
    await bucket.put("colour", b"green")
    print((await bucket.get("colour")).value.decode())
    await connection.request("greet", b"enough", timeout=30)
    await connection.drain()


asyncio.run(serve() if sys.argv[1] == "serve" else use(sys.argv[2]))
