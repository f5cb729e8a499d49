/** TLS to the store. */
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { copyFileSync, readFileSync, utimesSync, writeFileSync } from "node:fs";
import http2 from "node:http2";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { mock, test } from "node:test";
import type { TLSSocket } from "node:tls";

import { GrpcStore } from "../src/store.js";
import { certificateFile, directory, eventually, PATIENCE, skip, startStore } from "./support.js";

test("credentials follow their files, and calls under way go on", async (context) => {
  let tick = 1000;
  context.mock.method(performance, "now", () => tick);
  const [authority, first, second] = ["localhost", "first", "second"].map((name) => certificateFile([name])) as [
    string,
    string,
    string,
  ];
  const own = join(directory, "frontend.pem");
  copyFileSync(first, own);

  const pem = readFileSync(authority);
  const server = http2.createSecureServer({ cert: pem, key: pem, requestCert: true, rejectUnauthorized: false });
  const shown: string[] = [];
  const connections = new Set<unknown>();
  server.on("secureConnection", (socket: TLSSocket) => {
    shown.push(String(socket.getPeerCertificate().subject.CN));
    connections.add(socket);
    socket.on("close", () => connections.delete(socket));
  });
  const answers: (() => void)[] = [];
  server.on("stream", (stream: http2.ServerHttp2Stream) => {
    answers.push(() => {
      stream.respond({ ":status": 200, "content-type": "application/grpc", "grpc-status": "12" }, { endStream: true });
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "localhost", resolve));
  context.after(() => server.close());

  const logger = { info: mock.fn(), warn: mock.fn(), error: mock.fn() };
  const target = `localhost:${(server.address() as AddressInfo).port}`;
  const store = new GrpcStore(target, "shop", { ca: authority, cert: own, key: own }, logger);
  context.after(() => {
    store.close();
  });
  const call = (): Promise<unknown> => store.get(Buffer.alloc(32), PATIENCE).catch(String);
  const answered = async (pending: Promise<unknown>): Promise<void> => {
    await eventually("a call", () => answers.length > 0);
    answers.shift()?.();
    assert.match(String(await pending), /UNIMPLEMENTED/);
  };
  const look = async (): Promise<void> => {
    tick += 1000;
    await answered(call());
  };
  await look();
  assert.deepEqual(shown, ["first"]);

  copyFileSync(second, own);
  utimesSync(own, 0, Date.now() / 1000 + 3600); // just now, however slow the machine is
  await look();
  assert.equal(logger.info.mock.callCount(), 0); // the middle of a change
  const before = call();
  await eventually("a call", () => answers.length > 0);
  const answer = answers.shift();
  await look();
  assert.equal(logger.info.mock.callCount(), 1);
  await eventually("a connection with the new certificate", () => shown.includes("second"));
  answer?.();
  assert.match(String(await before), /UNIMPLEMENTED/);
  await eventually("the end of the old connection", () => connections.size === 1);
  await answered(call());
  assert.deepEqual(shown, ["first", "second"]);

  writeFileSync(own, "nonsense\n");
  for (let n = 0; n < 4; n++) await look();
  assert.equal(logger.error.mock.callCount(), 1);
  assert.deepEqual(shown, ["first", "second"]);
});

test("calls go to the servers that can be reached", { skip }, async () => {
  const [one, other] = [await startStore(), await startStore()];
  const store = new GrpcStore(`ipv4:${one.target},${other.target}`, "shop");
  for (const gone of [one, other]) {
    for (let n = 0; n < 10; n++) assert.equal(await store.get(randomBytes(32), PATIENCE), undefined);
    const ended = once(gone.process, "exit");
    gone.process.kill("SIGKILL");
    await ended;
  }
  await assert.rejects(store.get(randomBytes(32), 1000));
  store.close();
});
