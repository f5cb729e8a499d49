import assert from "node:assert/strict";
import { once } from "node:events";
import net from "node:net";
import type { AddressInfo } from "node:net";
import { PassThrough } from "node:stream";
import { test, type TestContext } from "node:test";
import tls from "node:tls";

import { chosenCipher, isRetried } from "../src/foreseen.js";
import { readHello } from "../src/hello.js";
import { peek } from "../src/peek.js";

/** The first flight of Node's own client. */
async function flight(context: TestContext, options: tls.ConnectionOptions): Promise<Buffer> {
  const server = net.createServer();
  context.after(() => server.close());
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const client = tls.connect({ port: (server.address() as AddressInfo).port, host: "127.0.0.1", ...options });
  client.on("error", () => undefined);
  const [connection] = (await once(server, "connection")) as [net.Socket];
  const [bytes] = (await once(connection, "data")) as [Buffer];
  client.destroy();
  connection.destroy();
  return bytes;
}

function records(message: Buffer, size: number): Buffer {
  const parts: Buffer[] = [];
  for (let at = 0; at < message.length; at += size) {
    const part = message.subarray(at, at + size);
    parts.push(Buffer.from([22, 3, 1, part.length >> 8, part.length & 255]), part);
  }
  return Buffer.concat(parts);
}

test("a client's hello says what it offers, however it is cut into records", async (context) => {
  const tls13 = await flight(context, { servername: "Shop.Example" });
  const tls12 = await flight(context, { maxVersion: "TLSv1.2" });
  for (const bytes of [tls13, records(tls13.subarray(5), 100), records(tls13.subarray(5), 1)]) {
    const hello = readHello(bytes);
    assert(hello && hello !== "incomplete");
    assert.deepEqual([hello.serverName, hello.offersTls13, hello.identities], ["shop.example", true, []]);
    for (const length of [0, 1, 5, 6, 50, bytes.length - 1]) assert.equal(readHello(bytes.subarray(0, length)), "incomplete");
    assert.deepEqual(readHello(Buffer.concat([bytes, Buffer.from([20, 3, 3, 0, 1, 1])])), hello);
  }
  const hello = readHello(tls12);
  assert(hello && hello !== "incomplete");
  assert.deepEqual([hello.serverName, hello.offersTls13, hello.sessionId.length], ["", false, 0]);
});

test("a hello shows whether the key exchange is tried again, where the server's groups are known", async (context) => {
  const hello = readHello(await flight(context, { ecdhCurve: "P-256:X25519:P-384" }));
  assert(hello && hello !== "incomplete");
  assert.deepEqual(hello.keyShares, [23]);
  for (const groups of ["auto", "P-256", "prime256v1:X25519", "X25519:secp256r1", "?*X25519MLKEM768/P-256", "P-384:unknown"]) {
    assert(!isRetried(hello, groups), groups);
  }
  for (const groups of ["P-384", "X25519:secp384r1", "x448"]) assert(isRetried(hello, groups), groups);
});

test("a hello shows which cipher of TLS 1.3 is chosen", async (context) => {
  const ciphers = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384";
  const hello = readHello(await flight(context, { ciphers }));
  assert(hello && hello !== "incomplete");
  assert.equal(chosenCipher(hello, tls.DEFAULT_CIPHERS, true), 0x1302);
  assert.equal(chosenCipher(hello, tls.DEFAULT_CIPHERS, false), 0x1301);
  assert.equal(chosenCipher(hello, "ECDHE+AESGCM:TLS_CHACHA20_POLY1305_SHA256", false), 0x1303);
  assert.equal(chosenCipher(hello, "ECDHE+AESGCM:TLS_AES_128_CCM_SHA256", true), undefined);
});

test("what is no hello, or too long for one, is none, and any bytes do no harm", async (context) => {
  const real = await flight(context, { servername: "shop.example" });
  for (const bytes of ["GET / HTTP/1.1\r\n\r\n", "\x80\x2e\x01", "\x16\x03\x01\x00\x00", "\x16\x03\x01\x00\x01\x02"]) {
    assert.equal(readHello(Buffer.from(bytes, "latin1")), undefined);
  }
  assert.equal(
    readHello(Buffer.concat([Buffer.from([22, 3, 1, 255, 255, 1, 255, 255, 255]), Buffer.alloc(20_000)])),
    undefined,
  );
  for (let at = 0; at < real.length; at++) {
    for (const value of [0, 1, 0x7f, 0xff]) {
      const changed = Buffer.from(real);
      changed[at] = value;
      readHello(changed); // throws nothing
    }
  }
});

test("peeking leaves every byte where it was", async (context) => {
  const bytes = await flight(context, {});
  for (const written of [[bytes], [bytes.subarray(0, 7), bytes.subarray(7)], [Buffer.from("GET /")]]) {
    const stream = new PassThrough();
    const peeked = peek(stream, 1000);
    for (const each of written) {
      stream.write(each);
      await new Promise(setImmediate);
    }
    assert.deepEqual(await peeked, readHello(Buffer.concat(written)));
    assert.deepEqual(stream.read(), Buffer.concat(written));
  }
});

test("a connection that says nothing, or leaves, ends the wait", async () => {
  const silent = new PassThrough();
  silent.write("\x16\x03\x01");
  assert.equal(await peek(silent, 10), undefined);
  assert.equal((silent.read() as Buffer).length, 3);
  for (const leave of [(stream: PassThrough) => stream.destroy(new Error("reset")), (stream: PassThrough) => stream.end()]) {
    const stream = new PassThrough();
    const peeked = peek(stream, 60_000);
    leave(stream);
    assert.equal(await peeked, "gone");
  }
});
