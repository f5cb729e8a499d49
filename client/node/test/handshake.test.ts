import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { renameSync } from "node:fs";
import http2 from "node:http2";
import https from "node:https";
import type { AddressInfo } from "node:net";
import net from "node:net";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import tls from "node:tls";

import { attach, Keyring, ResumedError, type Installation } from "../src/index.js";
import { FleetKey } from "../src/sealing.js";
import { CallError, type Store } from "../src/store.js";
import { status, type ServiceError } from "@grpc/grpc-js";
import {
  certificate,
  connect,
  eventually,
  fleetKey,
  forwarding,
  frontend,
  keyringFile,
  PATIENCE,
  pem,
  quiet,
  renamed,
  sessionOf,
  sharedStore,
  skip,
  startStore,
  total,
  VERSIONS,
  visit,
  type Version,
} from "./support.js";

/** Runs a test for TLS 1.2 and TLS 1.3 with the shared store. */
function onBothVersions(name: string, run: (context: TestContext, target: string, version: Version) => Promise<void>): void {
  for (const version of VERSIONS) {
    test(`${name} (${version})`, { skip }, async (context) => {
      await run(context, (await sharedStore()).target, version);
    });
  }
}

/** A store whose answers to look-ups are changed. */
function changed(store: Store, change: (value: Buffer, key: Buffer) => Buffer): Store {
  return forwarding(store, {
    async get(key, timeout) {
      const value = await store.get(key, timeout);
      return value && change(value, key);
    },
  });
}

onBothVersions("a frontend resumes what another one negotiated", async (context, target, version) => {
  const frontends = [await frontend(context, target), await frontend(context, target)] as const;
  let session: Buffer | undefined;
  for (let n = 0; n < 10; n++) {
    const seen = await visit(frontends[n % 2 ? 1 : 0].port, version, session);
    assert.equal(seen.resumed, n > 0, `connection ${n}`);
    session = seen.session;
  }
  const stats = frontends.map(({ sessions }) => sessions.stats);
  assert.deepEqual(
    stats.map(({ hits }) => total(hits)),
    [4, 5],
  );
  assert.deepEqual(
    stats.map(({ misses, foreignHits }) => total(misses) + total(foreignHits)), // both are in this process
    [0, 0],
  );
});

onBothVersions("a session that was removed does not resume anywhere", async (context, target, version) => {
  const [here, there] = [await frontend(context, target), await frontend(context, target)];
  const accepted = once(here.server, "secureConnection") as Promise<[tls.TLSSocket]>;
  const { session } = await visit(here.port, version);
  const ids = here.sessions.idsOf((await accepted)[0]);
  assert.equal(ids.length, version === "TLSv1.3" ? 2 : 1);
  for (const id of ids) there.sessions.remove(id);
  assert(await there.sessions.flush());
  assert(!(await visit(there.port, version, session)).resumed);
  assert.deepEqual(there.sessions.stats.misses, { unknown: 1 });
  assert.deepEqual(there.sessions.stats.removals, { application: ids.length });
});

onBothVersions(
  "of two frontends offered one session of single use at once, one resumes it",
  async (context, target, version) => {
    const one = await frontend(context, target, { singleUse: true });
    const other = await frontend(context, target, { singleUse: true });
    for (let round = 0; round < 20; round++) {
      const { session } = await visit(one.port, version);
      const visits = await Promise.all([one, other, one, other].map(({ port }) => visit(port, version, session)));
      assert.equal(visits.filter(({ resumed }) => resumed).length, 1, `round ${round}`);
    }
  },
);

for (const puts of ["wait", "background"] as const) {
  onBothVersions(`sessions are stored with puts: "${puts}"`, async (context, target, version) => {
    const [here, there] = [await frontend(context, target, { puts }), await frontend(context, target, { puts })];
    const { session } = await visit(here.port, version);
    if (puts === "background") await here.sessions.flush();
    assert((await visit(there.port, version, session)).resumed);
  });
}

onBothVersions("a fatal alert removes the session, a cut does not", async (context, target, version) => {
  const [here, there] = [await frontend(context, target), await frontend(context, target)];
  const raw = net.connect(here.port, "127.0.0.1");
  const client = await connect(here.port, version, undefined, { socket: raw });
  client.on("error", () => undefined);
  raw.write(Buffer.concat([Buffer.from("1703030040", "hex"), Buffer.alloc(64)])); // does not authenticate
  await eventually("a removal", async () => {
    await here.sessions.flush();
    return (here.sessions.stats.removals["fatal-error"] ?? 0) > 0;
  });
  assert(!(await visit(there.port, version, sessionOf(client))).resumed);
  const { session } = await visit(here.port, version);
  assert((await visit(there.port, version, session)).resumed);
});

for (const version of VERSIONS) {
  test(
    `a store that is down or hangs fails no handshake, and resumption comes back with it (${version})`,
    { skip },
    async (context) => {
      const store = await startStore();
      const { port, sessions } = await frontend(context, store.target, { deadlineMs: 50 });
      let session: Buffer | undefined;
      const resumes = async (): Promise<boolean> => {
        const seen = await visit(port, version, session);
        session = seen.session;
        return seen.resumed;
      };
      await eventually("resumption", resumes);
      await sessions.flush();

      store.process.kill("SIGSTOP"); // hangs
      const kept = session;
      // A machine that stands still now and then makes calls late that do not count.
      await eventually("an open breaker", async () => {
        assert(!(await visit(port, version, kept)).resumed);
        return sessions.breakerOpen;
      });
      const before = sessions.stats.misses;
      for (let n = 0; n < 20; n++) assert(!(await visit(port, version, kept)).resumed);
      const { misses } = sessions.stats;
      assert.equal(misses.timeout, before.timeout);
      assert.equal((misses["breaker-open"] ?? 0) - (before["breaker-open"] ?? 0), 20);
      store.process.kill("SIGCONT");
      await eventually("resumption after a hang", resumes);

      store.process.kill("SIGKILL"); // is down
      await eventually("an open breaker", async () => {
        assert(!(await resumes()));
        return sessions.breakerOpen;
      });
    },
  );
}

onBothVersions(
  "whatever the store returns that is no session of this fleet is a full handshake",
  async (context, target, version) => {
    const later = Math.floor(Date.now() / 1000) + 3600;
    const ring = new FleetKey(fleetKey);
    const stranger = new FleetKey(Buffer.alloc(32, 7));
    const seal = (key: Buffer, text: Buffer, end = later): Buffer => ring.seal(key, text, end, Buffer.alloc(12));
    const flip = (value: Buffer, at: number): Buffer => {
      const flipped = Buffer.from(value);
      flipped[at] = (flipped[at] ?? 0) ^ 1;
      return flipped;
    };
    const cases: [string, (value: Buffer, key: Buffer) => Buffer][] = [
      ["malformed", () => Buffer.alloc(1)],
      ["malformed", (value) => value.subarray(0, 40)],
      ["malformed", (value) => Buffer.concat([Buffer.from([1]), value.subarray(1)])], // had no fingerprint
      ["malformed", (_, key) => seal(key, Buffer.alloc(39))],
      ["malformed", () => Buffer.alloc(65_536)],
      ["not-authentic", (value) => Buffer.concat([value, Buffer.alloc(1)])],
      ["not-authentic", (value) => flip(value, value.length - 1)],
      ["not-authentic", (value) => flip(value, 12)], // not_after
      ["not-authentic", () => seal(Buffer.alloc(32), Buffer.from("another session"))],
      ["unknown-key", (_, key) => stranger.seal(key, Buffer.from("a session"), later, Buffer.alloc(12))],
      ["expired", (_, key) => seal(key, Buffer.from("a session"), Math.floor(Date.now() / 1000) - 60)], // the look-up takes time
      ["undecodable", (_, key) => seal(key, Buffer.concat([Buffer.alloc(40), Buffer.from("a session of another format")]))],
      ["undecodable", (_, key) => seal(key, Buffer.alloc(40))],
    ];
    for (const [n, [reason, change]] of cases.entries()) {
      const { port, sessions } = await frontend(context, target, { store: (store) => changed(store, change) });
      const { session } = await visit(port, version);
      assert(!(await visit(port, version, session)).resumed, String(n));
      assert.deepEqual(sessions.stats.misses, { [reason]: 1 }, String(n));
    }
  },
);

onBothVersions(
  "a session that this package takes for one, and OpenSSL does not, is a full handshake",
  async (context, target, version) => {
    const later = Math.floor(Date.now() / 1000) + 3600;
    const ring = Keyring.fromKeys(fleetKey);
    const head = (value: Buffer, key: Buffer): Buffer => {
      const opened = ring.open(key, value, 0);
      assert(typeof opened === "object");
      const session = Buffer.from(opened.plaintext);
      session[session.indexOf(Buffer.from([2, 2, 3, version === "TLSv1.3" ? 4 : 3])) + 2] = 9; // ssl_version
      return ring.seal(key, session, later);
    };
    const { port, sessions } = await frontend(context, target, { store: (store) => changed(store, head) });
    for (let n = 0; n < 3; n++) {
      const { session } = await visit(port, version);
      assert(!(await visit(port, version, session)).resumed);
    }
    const { hits, misses } = sessions.stats;
    assert.deepEqual([hits, misses], [{}, { "not-resumed": 3 }]);
  },
);

onBothVersions("an id that is too old is no call, one that nobody knows is a miss", async (context, target, version) => {
  let [lookups, now] = [0, Date.now() / 1000];
  const counted = (store: Store): Store =>
    changed(store, (value) => {
      lookups++;
      return value;
    });
  const { port, sessions } = await frontend(context, target, { store: counted, clock: () => now });
  const other = await frontend(context, target, { namespace: "bank" });
  const { session } = await visit(other.port, version);
  assert(!(await visit(port, version, session)).resumed);
  assert.deepEqual(sessions.stats.misses, { unknown: 1 });
  const { session: own } = await visit(port, version);
  now += 7200;
  assert(!(await visit(port, version, own)).resumed);
  assert.deepEqual([sessions.stats.misses, lookups], [{ unknown: 1, expired: 1 }, 1]);
});

onBothVersions("however often it is resumed, a session ends when its lifetime has passed", async (context, target, version) => {
  let now = Date.now() / 1000;
  const { port, sessions } = await frontend(context, target, { clock: () => now, lifetimeSeconds: 1000 });
  let { session } = await visit(port, version);
  for (let n = 0; n < 3; n++) {
    now += 250;
    const seen = await visit(port, version, session);
    assert(seen.resumed, JSON.stringify(sessions.stats.misses));
    session = seen.session;
  }
  now += 252;
  const seen = await visit(port, version, session);
  assert(!seen.resumed);
  assert.deepEqual(sessions.stats.misses, { expired: 1 });
  assert((await visit(port, version, seen.session)).resumed);
});

onBothVersions(
  "what a resumed connection issues was issued with the session that it resumed",
  async (context, target, version) => {
    const began = Date.now() / 1000;
    let now = began;
    const issued: number[] = [];
    const noted = (store: Store): Store => ({
      ...changed(store, (value) => value),
      batch(operations, timeout) {
        for (const { operation } of operations) {
          if (operation?.$case !== "put") continue;
          const { seconds, nanos } = operation.put.issueTime ?? { seconds: 0, nanos: 0 };
          issued.push(seconds + nanos / 1e9);
        }
        return store.batch(operations, timeout);
      },
    });
    const common = { store: noted, clock: () => now };
    const day = await frontend(context, target, { ...common, lifetimeSeconds: 86_400 });
    const hour = await frontend(context, target, { ...common, lifetimeSeconds: 3600 });
    let session: Buffer | undefined;
    for (const [n, { port }] of [day, hour, hour].entries()) {
      const seen = await visit(port, version, session);
      assert.equal(seen.resumed, n > 0);
      session = seen.session;
      now += 1200;
    }
    assert.equal(issued.length, version === "TLSv1.3" ? 4 : 1);
    for (const each of issued) assert(Math.abs(each - began) < 1e-5, `${each} is not ${began}`);
  },
);

onBothVersions("a limit that is used up is a miss and no outage", async (context, target, version) => {
  const refused = { get: 0, batch: 0 };
  let limited = true;
  const refuse = <Answer>(method: "get" | "batch", call: () => Promise<Answer>): Promise<Answer> => {
    if (!limited) return call();
    refused[method]++;
    const error = { code: status.RESOURCE_EXHAUSTED, details: "of the test" } as ServiceError;
    return Promise.reject(new CallError(error));
  };
  const refusing = (store: Store): Store => ({
    ...changed(store, (value) => value),
    get: (key, timeout) => refuse("get", () => store.get(key, timeout)),
    batch: (operations, timeout) => refuse("batch", () => store.batch(operations, timeout)),
  });
  let tick = performance.now();
  const { port, sessions } = await frontend(context, target, { store: refusing, puts: "background" });
  const { session } = await visit(port, version);
  await eventually("a Put was refused", () => refused.batch > 0);
  context.mock.method(performance, "now", () => tick);
  for (let n = 0; n < 5; n++) assert(!(await visit(port, version, session)).resumed);
  assert.deepEqual(sessions.stats.misses, { limited: 5 });
  assert.equal(refused.get, 0, "the store was not left alone");
  // A Batch that is refused in between begins another pause.
  const asked = (): boolean => refused.get > 0;
  const [pause, recovery] = [800, 200_000]; // milliseconds until there are calls, and until all sessions are served
  for (let n = 0; n < 10 && !asked(); n++) {
    tick += pause + recovery;
    assert(!(await visit(port, version, session)).resumed);
  }
  assert.deepEqual([refused.get, sessions.breakerOpen], [1, false]);
  limited = false;
  tick += pause + recovery;
  assert(await sessions.flush(PATIENCE));
  assert((await visit(port, version, session)).resumed);
});

onBothVersions("sessions survive a rotation of keys, until theirs is retired", async (context, target, version) => {
  let tick = performance.now();
  context.mock.method(performance, "now", () => tick);
  const [old, young] = [Buffer.alloc(32, 11), Buffer.alloc(32, 12)];
  const path = keyringFile(old);
  const keyring = Keyring.load(path, quiet);
  const { port, sessions } = await frontend(context, target, { keyring });
  const rotate = (...keys: Buffer[]): void => {
    renameSync(keyringFile(...keys), path);
    for (let n = 0; n < 2; n++) {
      tick += 1000;
      keyring.toString(); // looks at the file
    }
  };
  const { session } = await visit(port, version);
  rotate(young, old);
  assert((await visit(port, version, session)).resumed);
  const { session: later } = await visit(port, version);
  rotate(young);
  assert(!(await visit(port, version, session)).resumed);
  assert.deepEqual(sessions.stats.misses, { "unknown-key": 1 });
  assert((await visit(port, version, later)).resumed);
});

onBothVersions("a session negotiated for one server name does not resume for another", async (context, target, version) => {
  const { port, sessions } = await frontend(context, target);
  const { session } = await visit(port, version);
  assert(!(await visit(port, version, renamed(session, "bank.example"), { servername: "bank.example" })).resumed);
  assert.deepEqual(sessions.stats.misses, { "server-name-mismatch": 1 });
  const nameless = { servername: "", checkServerIdentity: () => undefined };
  const { session: ofNobody } = await visit(port, version, undefined, nameless);
  assert((await visit(port, version, ofNobody, nameless)).resumed);
  assert((await visit(port, version, renamed(session, "SHOP.example"), { servername: "SHOP.example" })).resumed);
});

onBothVersions("a client's certificate is there on resumption", async (context, target, version) => {
  const options = { requestCert: true, rejectUnauthorized: true, ca: pem };
  const { port, server } = await frontend(context, target, { server: options });
  const names: string[] = [];
  server.on("secureConnection", (socket) => {
    assert(socket.authorized);
    names.push(String(socket.getPeerCertificate().subject.CN));
  });
  const client = { cert: pem, key: pem };
  const { session } = await visit(port, version, undefined, client);
  assert((await visit(port, version, session, client)).resumed);
  assert.deepEqual(names, ["shop.example", "shop.example"]);
});

onBothVersions("certificates renewed by setSecureContext() change nothing", async (context, target, version) => {
  const { port, server } = await frontend(context, target);
  const { session } = await visit(port, version);
  server.setSecureContext({ cert: pem, key: pem });
  const seen = await visit(port, version, session);
  assert(seen.resumed);
  assert((await visit(port, version, seen.session)).resumed);
});

onBothVersions("after close() connections go on, without resumption", async (context, target, version) => {
  const { port, sessions } = await frontend(context, target);
  const { session } = await visit(port, version);
  await sessions.close();
  for (let n = 0; n < 3; n++) assert(!(await visit(port, version, session)).resumed);
});

onBothVersions("https and http2 servers resume", async (context, target, version) => {
  const settings = { cert: pem, key: pem };
  const options = { target, namespace: "web", keyring: Keyring.fromKeys(fleetKey), deadlineMs: 5000, logger: quiet };
  const secure = https.createServer(settings, (_request, response) => response.end("hello"));
  const second = http2.createSecureServer({ ...settings, allowHTTP1: true }, (_request, response) => response.end("hello"));
  const sessions: Installation[] = [];
  for (const server of [secure, second]) {
    sessions.push(attach(server, options));
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    context.after(() => server.close());
  }
  let session: Buffer | undefined;
  const got: boolean[] = [];
  for (const server of [secure, second, secure, second]) {
    const { port } = server.address() as AddressInfo;
    const agent = new https.Agent({
      ca: pem,
      servername: "shop.example",
      minVersion: version,
      maxVersion: version,
      maxCachedSessions: 0,
    });
    const request = https.get({ port, host: "127.0.0.1", agent, ...(session && { session }) });
    const [response] = (await once(request, "response")) as [NodeJS.ReadableStream & { socket: tls.TLSSocket }];
    const socket = response.socket;
    socket.on("session", (ticket: Buffer) => (session = ticket));
    response.resume();
    await once(response, "end");
    got.push(socket.isSessionReused());
    session = version === "TLSv1.2" ? socket.getSession() : (session ?? socket.getSession());
    agent.destroy();
  }
  assert.deepEqual(got, [false, true, true, true]);
  await Promise.all(sessions.map((each) => each.close()));
});

test("what is no TLS, or cut off, or silent, harms nobody", { skip }, async (context) => {
  const { port, server } = await frontend(context, (await sharedStore()).target);
  const errors: (string | undefined)[] = [];
  server.on("tlsClientError", (error: NodeJS.ErrnoException) => errors.push(error.code));
  for (const bytes of ["GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x01", ""]) {
    const raw = net.connect(port, "127.0.0.1");
    raw.on("error", () => undefined);
    raw.end(bytes, "latin1");
    await once(raw, "close");
  }
  assert((await visit(port, "TLSv1.3")).session);
  assert.deepEqual(errors, ["ERR_SSL_HTTP_REQUEST"]);
});

test("a frontend starts, and serves, before there is a store", async (context) => {
  const { port, sessions } = await frontend(context, "127.0.0.1:1", { deadlineMs: 50 });
  let session: Buffer | undefined;
  await eventually("an open breaker", async () => {
    const seen = await visit(port, "TLSv1.3", session);
    assert(!seen.resumed);
    session = seen.session;
    return sessions.breakerOpen;
  });
});

test("a program ends by itself once it has closed its server and its sessions", { skip }, async (context) => {
  const { target } = await sharedStore();
  const keyring = keyringFile(fleetKey);
  const program = `
    const tls = require("node:tls");
    const { attach } = require(${JSON.stringify(join(__dirname, "../src/index.js"))});
    const pem = require("node:fs").readFileSync(${JSON.stringify(certificate)});
    const server = tls.createServer({ cert: pem, key: pem }, (socket) => socket.end("x"));
    const sessions = attach(server, { target: ${JSON.stringify(target)}, namespace: "ends", keyring: ${JSON.stringify(keyring)} });
    server.listen(0, "127.0.0.1", () => {
      const client = tls.connect({ port: server.address().port, rejectUnauthorized: false }, () => client.resume());
      client.on("close", () => server.close(() => sessions.close()));
    });`;
  const child = spawn(process.execPath, ["-e", program], { stdio: "inherit" });
  context.after(() => child.kill());
  assert.deepEqual(await Promise.race([once(child, "exit"), sleep(PATIENCE, "still there", { ref: false })]), [0, null]);
});

test("where the key exchange is tried again, no single use is spent for nothing", { skip }, async (context) => {
  let calls = 0;
  const counted = (store: Store): Store => ({
    ...changed(store, (value) => {
      calls++;
      return value;
    }),
    take(key, timeout) {
      calls++;
      return store.take(key, timeout);
    },
  });
  const { target } = await sharedStore();
  const options = { singleUse: true, store: counted, server: { ecdhCurve: "P-384" } };
  const { port, sessions } = await frontend(context, target, options);
  const { session } = await visit(port, "TLSv1.3");
  // A client brings a key for the first of its groups.
  assert(!(await visit(port, "TLSv1.3", session, { ecdhCurve: "X25519:P-384" })).resumed);
  assert.deepEqual([sessions.stats.misses, calls], [{ "not-resumed": 1 }, 0]);
  assert((await visit(port, "TLSv1.3", session, { ecdhCurve: "P-384:X25519" })).resumed);
});

test(
  "a session with another hash than the chosen cipher's is a miss, stays, and is followed by others",
  { skip },
  async (context) => {
    const { target } = await sharedStore();
    for (const honorCipherOrder of [true, false]) {
      const [first, second] = ["TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"];
      const server = { honorCipherOrder, ciphers: honorCipherOrder ? `${second}:${first}` : `${first}:${second}` };
      const { port, sessions } = await frontend(context, target, { server, singleUse: true });
      const { session } = await visit(port, "TLSv1.3", undefined, { ciphers: first });
      const seen = await visit(port, "TLSv1.3", session, { ciphers: `${second}:${first}` }); // waits for a ticket
      assert(!seen.resumed);
      assert.deepEqual([sessions.stats.hits, sessions.stats.misses], [{}, { "other-cipher": 1 }]);
      assert((await visit(port, "TLSv1.3", session, { ciphers: first })).resumed);
      assert((await visit(port, "TLSv1.3", seen.session, { ciphers: `${second}:${first}` })).resumed);
    }
  },
);

test("options that are missing, of another type or outside their range are refused in one line that says what to do", () => {
  const options = { target: "127.0.0.1:1", namespace: "shop", keyring: Keyring.fromKeys(fleetKey) };
  const refused: [object, RegExp][] = [
    [{ target: undefined }, /target must be/],
    [{ namespace: undefined }, /namespace must be/],
    [{ namespace: "Shop" }, /namespace must be.*"Shop"/],
    [{ namespace: ["shop"] }, /namespace must be/],
    [{ keyring: undefined }, /keyring must be.*resumed keygen/],
    [{ keyring: fleetKey }, /keyring must be a keyring file[^\x01]*$/],
    [{ keyring: "/nowhere" }, /resumed keygen/],
    [{ lifetimeSeconds: 604_801 }, /lifetimeSeconds must be/],
    [{ lifetimeSeconds: "60" }, /lifetimeSeconds must be/],
    [{ deadlineMs: 0 }, /deadlineMs must be/],
    [{ deadlineMs: "50" }, /deadlineMs must be.*not "50"/],
    [{ deadlineMs: NaN }, /deadlineMs must be/],
    [{ deadlineMs: 5e10 }, /deadlineMs must be/], // more than a timer can wait
    [{ maxLookups: 0 }, /maxLookups must be/],
    [{ singleUse: "no" }, /singleUse must be/],
    [{ ids: "sealed" }, /ids must be "any"/],
    [{ puts: "never" }, /puts must be/],
    [{ tls: { ca: "/nowhere" } }, /tls.*nowhere/],
    [{ tls: true }, /tls must have/],
    [{ tls: { ca: pem, cert: pem } }, /tls must have/],
    [{ logger: {} }, /logger must have/],
    [{ lifeTime: 60 }, /there is no option lifeTime/],
  ];
  const isRefusal =
    (complaint: RegExp) =>
    (error: Error): boolean => {
      assert(error instanceof ResumedError && complaint.test(error.message) && !error.message.includes("\n"), error);
      return true;
    };
  for (const [wrong, complaint] of refused) {
    const server = tls.createServer();
    assert.throws(() => attach(server, { ...options, ...wrong }), isRefusal(complaint));
  }
  assert.throws(() => attach(tls.createServer(), undefined as never), isRefusal(/needs options/));
  const taken = tls.createServer();
  taken.on("newSession", (_id, _session, done: () => void) => {
    done();
  });
  assert.throws(() => attach(taken, options), /newSession listeners already/);
});

test("a store that answers otherwise than a session store is a miss", () => {
  for (const [code, reason] of [
    [status.DEADLINE_EXCEEDED, "timeout"],
    [status.UNAVAILABLE, "unavailable"],
    [status.PERMISSION_DENIED, "rejected"],
  ] as const) {
    assert.equal(new CallError(Object.assign(new Error(), { code, details: "", metadata: undefined as never })).reason, reason);
  }
});
