/** Sessions as tickets: handshakes at two servers that share nothing but the store. */
import assert from "node:assert/strict";
import { constants } from "node:crypto";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { test, type TestContext } from "node:test";
import tls from "node:tls";

import { attach, type Options } from "../src/index.js";
import {
  certificateFile,
  connect,
  eventually,
  fleetKey,
  frontend,
  keyringFile,
  pem,
  purge,
  quiet,
  sharedStore,
  skip,
  visit,
  VERSIONS,
  type Frontend,
  type Version,
} from "./support.js";

const options = { sessions: "tickets", ticketsTls12: true } as const;
type Extras = NonNullable<Parameters<typeof frontend>[2]>;

/** The beginning of the epoch of a server's key; a server without the fleet's key has a random number. */
function epochOf({ server }: Frontend): number {
  return server.getTicketKeys().readUInt32BE();
}

/** A server that has the fleet's key. */
async function ticketServer(context: TestContext, namespace: string, extras: Extras = {}): Promise<Frontend> {
  const { target } = await sharedStore();
  const made = await frontend(context, target, { ...options, namespace, ...extras });
  const { clock = () => Date.now() / 1000, rotationSeconds = 3600 } = extras;
  await eventually("the agreement", () => epochOf(made) === Math.floor(clock() / rotationSeconds) * rotationSeconds);
  return made;
}

/** Returns whether a server resumes a ticket. A resumed connection of TLS 1.3 brings no new one. */
async function resumes(port: number, version: Version, session?: Buffer, ca = [pem]): Promise<boolean> {
  assert(session, "the client has no ticket");
  const socket = tls.connect({ port, host: "127.0.0.1", ca, servername: "shop.example", session, maxVersion: version });
  await once(socket, "data");
  const resumed = socket.isSessionReused();
  socket.destroy();
  return resumed;
}

for (const version of VERSIONS) {
  test(`each server resumes the tickets of the other (${version})`, { skip }, async (context) => {
    const one = await ticketServer(context, `both-${version.toLowerCase()}`);
    const other = await ticketServer(context, `both-${version.toLowerCase()}`);
    assert.deepEqual(one.server.getTicketKeys(), other.server.getTicketKeys());
    for (const [from, to] of [
      [one, other],
      [other, one],
    ] as const) {
      const { session } = await visit(from.port, version);
      assert(await resumes(to.port, version, session));
      assert.deepEqual(to.sessions.stats.ticketsResumed, { current: 1 });
    }
    assert.deepEqual(one.sessions.stats.puts, {}, "nothing is stored");
  });

  test(`a rotation needs no connection, and ends the tickets of before (${version})`, { skip }, async (context) => {
    const time = { now: 1_800_000_000 };
    const extras = { clock: () => time.now, rotationSeconds: 1000, lifetimeSeconds: 1000 };
    const namespace = `rotation-${version.toLowerCase()}`;
    const fleet = [await ticketServer(context, namespace, extras), await ticketServer(context, namespace, extras)];
    const [one, other] = fleet as [Frontend, Frontend];
    const { session } = await visit(one.port, version);
    time.now += 1000;
    // As setSecureContext() does at a renewal, without waiting for a timer.
    for (const { server } of fleet) server.setSecureContext({ cert: pem, key: pem });
    assert.equal(epochOf(one), 1_800_001_000);
    assert.deepEqual(one.sessions.ticketSecret, { created: 1_800_000_000, heldOver: false });
    assert.deepEqual(one.server.getTicketKeys(), other.server.getTicketKeys());
    assert(!(await resumes(other.port, version, session)));
    const fresh = await visit(one.port, version);
    assert(await resumes(other.port, version, fresh.session));
  });
}

test("a connection goes on while the key changes and the certificate is renewed", { skip }, async (context) => {
  const { server, port } = await ticketServer(context, "goes-on");
  const socket = await connect(port, "TLSv1.3");
  context.after(() => socket.destroy());
  server.setTicketKeys(Buffer.alloc(48));
  server.setSecureContext({ cert: pem, key: pem });
  assert.notDeepEqual(server.getTicketKeys(), Buffer.alloc(48), "the fleet's key was not set again");
  server.once("secureConnection", () => assert.fail("a new connection"));
  assert(socket.writable && !socket.destroyed);
});

test("another namespace, and a certificate with other names, resume no ticket", { skip }, async (context) => {
  const one = await ticketServer(context, "apart");
  const stranger = await ticketServer(context, "apart-2");
  const host = readFileSync(certificateFile(["shop.example", "other.example"]), "utf8");
  const other = await ticketServer(context, "apart", { server: { cert: host, key: host } });
  const tenant = await ticketServer(context, "apart", { server: { sessionIdContext: "tenant" } });
  assert.deepEqual(one.server.getTicketKeys(), other.server.getTicketKeys());
  for (const version of VERSIONS) {
    const { session } = await visit(one.port, version);
    for (const { port } of [stranger, other, tenant]) {
      assert(!(await resumes(port, version, session, [pem, host])));
    }
    assert(await resumes(one.port, version, session));
  }
});

test("a renewed certificate with the same names ends no ticket", { skip }, async (context) => {
  const one = await ticketServer(context, "renewed");
  const { session } = await visit(one.port, "TLSv1.3");
  const next = readFileSync(certificateFile(["shop.example", "bank.example"]), "utf8");
  one.server.setSecureContext({ cert: next, key: next });
  assert(await resumes(one.port, "TLSv1.3", session, [pem, next]));
});

test("without a store connections are served, and the server's own tickets resume", async (context) => {
  const { port } = await frontend(context, "127.0.0.1:1", options);
  const { session } = await visit(port, "TLSv1.3");
  assert(await resumes(port, "TLSv1.3", session));
});

test("after close() no ticket of the fleet resumes", { skip }, async (context) => {
  const [one, other] = [await ticketServer(context, "closed"), await ticketServer(context, "closed")];
  const { session } = await visit(one.port, "TLSv1.3");
  await other.sessions.close();
  assert(!(await resumes(other.port, "TLSv1.3", session)));
});

test("a purge ends the tickets of all servers, and later ones resume", { skip }, async (context) => {
  const [one, other] = [await ticketServer(context, "purged"), await ticketServer(context, "purged")];
  const { session } = await visit(one.port, "TLSv1.3");
  const keys = [one, other].map(({ server }) => server.getTicketKeys());
  purge((await sharedStore()).target, "purged");
  await eventually("other keys", () =>
    [one, other].every(({ server }, n) => !server.getTicketKeys().equals(keys[n] as Buffer)),
  );
  await eventually("the agreement", () => one.server.getTicketKeys().equals(other.server.getTicketKeys()));
  assert(!(await resumes(other.port, "TLSv1.3", session)));
  const { session: later } = await visit(one.port, "TLSv1.3");
  assert(await resumes(other.port, "TLSv1.3", later));
});

test("a connection that shows another certificate after its handshake is ended", { skip }, async (context) => {
  const host = readFileSync(certificateFile(["other.example"]), "utf8");
  const swap = { armed: false };
  const ALPNCallback = function (this: { setKeyCert?: (context: tls.SecureContext) => void }): undefined {
    if (swap.armed) this.setKeyCert?.(tls.createSecureContext({ cert: host, key: host }));
    return undefined;
  };
  const server = { ALPNCallback } as unknown as tls.TlsOptions;
  if (!("setKeyCert" in tls.TLSSocket.prototype)) return;
  const { port, sessions } = await ticketServer(context, "swapped", { server });
  const { session } = await visit(port, "TLSv1.3", undefined, { ALPNProtocols: ["x"] }).catch(() => ({ session: undefined }));
  swap.armed = true;
  const socket = tls.connect({ port, host: "127.0.0.1", ca: pem, servername: "shop.example", session, ALPNProtocols: ["x"] });
  await once(socket, "close").catch(() => undefined);
  assert.deepEqual(sessions.stats.ticketsResumed, {});
});

const REFUSED: [string, tls.TlsOptions, Partial<Options>, RegExp][] = [
  ["that asks for certificates", { requestCert: true }, {}, /requestCert.*use sessions: "stored"/],
  ["with an SNICallback", { SNICallback: () => undefined }, {}, /chooses contexts by name.*use sessions: "stored"/],
  ["with TLS 1.2, unless that is asked for", {}, { ticketsTls12: false }, /minVersion: "TLSv1.3", or pass ticketsTls12: true/],
  ["without tickets", { secureOptions: constants.SSL_OP_NO_TICKET }, {}, /SSL_OP_NO_TICKET/],
  ["with single use", {}, { singleUse: true }, /singleUse needs sessions: "stored"/],
  [
    "with an unknown kind of sessions",
    {},
    { sessions: "both" as "stored" },
    /sessions must be "stored" or "tickets", not "both"/,
  ],
  ["with a rotation of none", {}, { rotationSeconds: 0 }, /rotationSeconds must be a whole number from 1 to 604800, not 0/],
];
for (const [which, server, given, complaint] of REFUSED) {
  test(`a server ${which} is refused`, () => {
    const keyring = keyringFile(fleetKey);
    const all = { target: "127.0.0.1:1", namespace: "shop", keyring, logger: quiet, ...options, ...given };
    assert.throws(() => attach(tls.createServer({ cert: pem, key: pem, ...server }), all), complaint);
  });
}

test("TLS 1.3 alone needs no consent", async (context) => {
  const { sessions } = await frontend(context, "127.0.0.1:1", { sessions: "tickets", server: { minVersion: "TLSv1.3" } });
  assert.deepEqual(sessions.stats.ticketsResumed, {});
});

test("a second context is refused, and so is the removal of a ticket", async (context) => {
  const { server, sessions } = await frontend(context, "127.0.0.1:1", options);
  assert.throws(() => {
    server.addContext("bank.example", { cert: pem, key: pem });
  }, /chooses contexts by name/);
  assert.throws(() => {
    sessions.remove(Buffer.alloc(32));
  }, /cannot be removed/);
});
