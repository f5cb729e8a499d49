/** A session resumes only where a full handshake would have proved the same. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { test, type TestContext } from "node:test";
import tls from "node:tls";

import { Contexts } from "../src/contexts.js";
import { unwrap, wrap } from "../src/envelope.js";
import { Keyring } from "../src/index.js";
import { Session } from "../src/session.js";
import type { Store } from "../src/store.js";
import {
  certificateFile,
  connect,
  fleetKey,
  forwarding,
  frontend,
  quiet,
  sessionOf,
  sharedStore,
  skip,
  VERSIONS,
  visit,
  type Frontend,
  type Version,
  type Visit,
} from "./support.js";

const [client, stranger, bank, more, renewed] = [
  ["client"],
  ["stranger"],
  ["bank.example"],
  ["shop.example", "bank.example", "pay.example"],
  ["bank.example", "shop.example"],
].map((names) => readFileSync(certificateFile(names), "utf8")) as [string, string, string, string, string];

function onBothVersions(name: string, run: (context: TestContext, target: string, version: Version) => Promise<void>): void {
  for (const version of VERSIONS) {
    test(`${name} (${version})`, { skip }, async (context) => {
      await run(context, (await sharedStore()).target, version);
    });
  }
}

/** A client that does not look at the server's certificate. */
const careless = { rejectUnauthorized: false, checkServerIdentity: () => undefined };
const withCertificate = { ...careless, cert: client, key: client };
const demanding = { requestCert: true, rejectUnauthorized: true, ca: client };
const asking = { ...demanding, rejectUnauthorized: false };

const refused = async (visits: Promise<Visit>): Promise<boolean> =>
  visits.then(
    () => false,
    () => true,
  );

const cases: {
  name: string;
  from: tls.TlsOptions;
  to: tls.TlsOptions;
  /** The client's options, first and when it comes back. */
  visits: [tls.ConnectionOptions, tls.ConnectionOptions];
  want: "resumed" | "full" | "refused";
}[] = [
  { name: "the same", from: {}, to: {}, visits: [careless, careless], want: "resumed" },
  { name: "demands, the same", from: demanding, to: demanding, visits: [withCertificate, withCertificate], want: "resumed" },
  { name: "asks for none, then demands", from: {}, to: demanding, visits: [careless, careless], want: "refused" },
  { name: "asks for none, then asks", from: {}, to: asking, visits: [careless, careless], want: "full" },
  { name: "demands, then asks for none", from: demanding, to: {}, visits: [withCertificate, careless], want: "full" },
  { name: "asks, then demands", from: asking, to: demanding, visits: [withCertificate, withCertificate], want: "full" },
  {
    name: "other authorities",
    from: demanding,
    to: { ...demanding, ca: stranger },
    visits: [withCertificate, withCertificate],
    want: "refused",
  },
  {
    name: "one authority more",
    from: demanding,
    to: { ...demanding, ca: [stranger, client] },
    visits: [withCertificate, withCertificate],
    want: "full",
  },
  {
    name: "the authorities of Node",
    from: demanding,
    to: { requestCert: true },
    visits: [withCertificate, withCertificate],
    want: "refused",
  },
  { name: "renewed", from: {}, to: { cert: renewed, key: renewed }, visits: [careless, careless], want: "resumed" },
  { name: "another host", from: {}, to: { cert: bank, key: bank }, visits: [careless, careless], want: "full" },
  { name: "one name more", from: {}, to: { cert: more, key: more }, visits: [careless, careless], want: "full" },
  {
    name: "the same session id context",
    from: { sessionIdContext: "one" },
    to: { sessionIdContext: "one" },
    visits: [careless, careless],
    want: "resumed",
  },
  {
    name: "another session id context",
    from: { sessionIdContext: "one" },
    to: { sessionIdContext: "other" },
    visits: [careless, careless],
    want: "full",
  },
  {
    name: "a session id context, then none",
    from: { sessionIdContext: "one" },
    to: {},
    visits: [careless, careless],
    want: "full",
  },
];

for (const { name, from, to, visits, want } of cases) {
  onBothVersions(`contexts: ${name}`, async (context, target, version) => {
    const here = await frontend(context, target, { server: from });
    const there = await frontend(context, target, { server: to });
    const { session } = await visit(here.port, version, undefined, visits[0]);
    const back = visit(there.port, version, session, visits[1]);
    if (want === "refused") assert(await refused(back));
    else assert.equal((await back).resumed, want === "resumed");
    const { misses, terminations } = there.sessions.stats;
    assert.deepEqual([misses, terminations], [want === "resumed" ? {} : { "context-mismatch": 1 }, {}]);
  });
}

onBothVersions("unlike session id contexts share sessions if they are ignored", async (context, target, version) => {
  const ignoring = { ignoreIdContext: true };
  const one = await frontend(context, target, { ...ignoring, server: { sessionIdContext: "one" } });
  const other = await frontend(context, target, { ...ignoring, server: { sessionIdContext: "other" } });
  const heeding = await frontend(context, target);
  const { session } = await visit(one.port, version);
  assert((await visit(other.port, version, session)).resumed);
  assert(!(await visit(heeding.port, version, session)).resumed);
});

onBothVersions("Node's own session id context, of the process's arguments, is one", async (context, target, version) => {
  const one = await frontend(context, target);
  process.argv.push("another argument");
  const other = await frontend(context, target);
  process.argv.pop();
  const { session } = await visit(one.port, version);
  assert((await visit(other.port, version, session)).resumed);
});

onBothVersions("setSecureContext() brings another identity", async (context, target, version) => {
  const { port, server, sessions } = await frontend(context, target);
  const { session } = await visit(port, version, undefined, careless);
  server.setSecureContext({ cert: bank, key: bank });
  assert(!(await visit(port, version, session, careless)).resumed);
  assert.deepEqual(sessions.stats.misses, { "context-mismatch": 1 });
  const { session: own } = await visit(port, version, undefined, careless);
  assert((await visit(port, version, own, careless)).resumed);
});

onBothVersions(
  "a server that asks for certificates shares no session without a verified one",
  async (context, target, version) => {
    const { port, server, sessions } = await frontend(context, target, { server: asking });
    const authorized: boolean[] = [];
    server.on("secureConnection", (socket) => authorized.push(socket.authorized));
    for (const options of [careless, { ...careless, cert: stranger, key: stranger }]) {
      const { session } = await visit(port, version, undefined, options);
      assert(!(await visit(port, version, session, options)).resumed);
    }
    assert.deepEqual(authorized, [false, false, false, false]);
    const { misses, puts, hits } = sessions.stats;
    assert.deepEqual([misses, puts, hits], [{ unknown: 4 - 2 }, { unresumable: version === "TLSv1.3" ? 8 : 4 }, {}]);
  },
);

/** A store that gives each session the fingerprint of this context. */
function forging(store: Store, fingerprint: () => Buffer): Store {
  const ring = Keyring.fromKeys(fleetKey);
  return forwarding(store, {
    async get(key, timeout) {
      const value = await store.get(key, timeout);
      const opened = value && ring.open(key, value, 0);
      if (typeof opened !== "object") return value;
      const envelope = unwrap(opened.plaintext);
      assert(envelope);
      return ring.seal(key, wrap({ ...envelope, fingerprint: fingerprint() }), opened.notAfter);
    },
  });
}

onBothVersions("no certificate, no entry, should fingerprints ever agree", async (context, target, version) => {
  for (const [from, to, first] of [
    [{}, demanding, careless],
    [{}, asking, careless],
    [demanding, {}, withCertificate],
  ] as const) {
    const here = await frontend(context, target, { server: from });
    const there: Frontend = await frontend(context, target, {
      server: to,
      store: (store) =>
        forging(store, () => {
          const { context: known } = new Contexts(there.server, undefined, quiet).begin("shop.example");
          assert(typeof known === "object");
          return known.fingerprint;
        }),
    });
    const { session } = await visit(here.port, version, undefined, first);
    const back = visit(there.port, version, session, careless);
    if (to === demanding) assert(await refused(back));
    else assert(!(await back).resumed);
    assert.deepEqual(there.sessions.stats.misses, { "context-mismatch": 1 });
  }
});

onBothVersions("a session ends with the certificate of its client", async (context, target, version) => {
  let now = Date.now() / 1000;
  const short = readFileSync(certificateFile(["client"], 1), "utf8");
  const server = { ...demanding, ca: short };
  const { port, sessions } = await frontend(context, target, { server, lifetimeSeconds: 604_800, clock: () => now });
  const { session } = await visit(port, version, undefined, { ...careless, cert: short, key: short });
  now += 86_300;
  assert((await visit(port, version, session, { ...careless, cert: short, key: short })).resumed);
  now += 200;
  assert(!(await visit(port, version, session, { ...careless, cert: short, key: short })).resumed);
  assert.deepEqual(sessions.stats.misses, { expired: 1 });
});

onBothVersions("a mismatch does not use up a session of single use", async (context, target, version) => {
  const here = await frontend(context, target, { singleUse: true });
  const takes: Buffer[] = [];
  const counting = (store: Store): Store =>
    forwarding(store, {
      take(key, timeout) {
        takes.push(key);
        return store.take(key, timeout);
      },
    });
  const there = await frontend(context, target, { singleUse: true, server: asking, store: counting });
  const { session } = await visit(here.port, version);
  assert(!(await visit(there.port, version, session)).resumed);
  assert.deepEqual([there.sessions.stats.misses, takes], [{ "context-mismatch": 1 }, []]);
  assert((await visit(here.port, version, session)).resumed);
  assert(!(await visit(here.port, version, session)).resumed);
  assert.deepEqual(here.sessions.stats.misses, { unknown: 1 });
});

onBothVersions("what another frontend takes between Get and Take is a miss", async (context, target, version) => {
  const losing = (store: Store): Store => forwarding(store, { take: () => Promise.resolve(undefined) });
  const { port, sessions } = await frontend(context, target, { singleUse: true, store: losing });
  const { session } = await visit(port, version);
  assert(!(await visit(port, version, session)).resumed);
  assert.deepEqual([sessions.stats.misses, sessions.stats.hits], [{ unknown: 1 }, {}]);
});

onBothVersions("what is stored has no ticket application data", async (context, target, version) => {
  const ring = Keyring.fromKeys(fleetKey);
  const stored: (Session | undefined)[] = [];
  const watching = (store: Store): Store =>
    forwarding(store, {
      batch(operations, timeout) {
        for (const { operation } of operations) {
          if (operation?.$case !== "put") continue;
          const opened = ring.open(operation.put.key, operation.put.value, 0);
          assert(typeof opened === "object");
          stored.push(Session.parse(unwrap(opened.plaintext)?.session ?? Buffer.alloc(0)));
        }
        return store.batch(operations, timeout);
      },
    });
  const { port } = await frontend(context, target, { store: watching });
  const { session } = await visit(port, version);
  assert((await visit(port, version, session)).resumed);
  assert.deepEqual(
    stored.map((each) => each?.lineage),
    new Array(version === "TLSv1.3" ? 3 : 1).fill(undefined),
  );
});

for (const how of ["addContext", "SNICallback"] as const) {
  onBothVersions(`virtual hosts of ${how} share sessions once their names are known`, async (context, target, version) => {
    const ofBank = tls.createSecureContext({ cert: bank, key: bank });
    const server: tls.TlsOptions =
      how === "SNICallback"
        ? {
            SNICallback: (name, done) => {
              done(null, name === "bank.example" ? ofBank : undefined);
            },
          }
        : {};
    const start = async (): Promise<Frontend> => {
      const started = await frontend(context, target, { server });
      if (how === "addContext") started.server.addContext("bank.example", ofBank);
      return started;
    };
    const [here, there] = [await start(), await start()];
    for (const servername of ["bank.example", "shop.example"]) {
      const options = { ...careless, servername };
      const { session } = await visit(here.port, version, undefined, options);
      // Not known yet, and so not stored; but tickets of TLS 1.3 come when it is.
      assert.equal((await visit(here.port, version, session, options)).resumed, version === "TLSv1.3");
      const { session: known } = await visit(here.port, version, undefined, options);
      assert((await visit(here.port, version, known, options)).resumed, servername);
      assert(!(await visit(there.port, version, known, options)).resumed, servername); // not known there
      assert((await visit(there.port, version, known, options)).resumed, servername);
    }
    const { misses } = there.sessions.stats;
    assert.deepEqual(misses, { "context-unknown": 2 });
    const nameless = { ...careless, servername: "" };
    const { session } = await visit(here.port, version, undefined, nameless);
    assert((await visit(there.port, version, session, nameless)).resumed);
  });
}

onBothVersions("an identity that a virtual host has here does not do for another one's", async (context, target, version) => {
  const here = await frontend(context, target);
  const there = await frontend(context, target);
  there.server.addContext("shop.example", tls.createSecureContext({ cert: bank, key: bank }));
  await visit(there.port, version, undefined, careless); // becomes known
  const { session } = await visit(here.port, version);
  assert(!(await visit(there.port, version, session, careless)).resumed);
  assert.deepEqual(there.sessions.stats.misses, { "context-mismatch": 1 });
});

onBothVersions("a name that unlike contexts serve does not resume", async (context, target, version) => {
  let chosen = bank;
  const warnings: string[] = [];
  const logger = { ...quiet, warn: (line: string) => warnings.push(line) };
  const server: tls.TlsOptions = {
    SNICallback: (_name, done) => {
      done(null, tls.createSecureContext({ cert: chosen, key: chosen }));
    },
  };
  const { port, sessions } = await frontend(context, target, { server, logger });
  const full = (): Promise<Visit> => visit(port, version, undefined, careless);
  await full();
  const { session } = await full();
  assert((await visit(port, version, session, careless)).resumed);
  chosen = stranger;
  const { session: other } = await full();
  await sessions.flush();
  for (const each of [session, other]) assert(!(await visit(port, version, each, careless)).resumed);
  assert.deepEqual(sessions.stats.misses, { "context-unstable": 2 });
  // Tickets of TLS 1.3 come when the handshake is done, and are not stored.
  assert.deepEqual(sessions.stats.removals, version === "TLSv1.3" ? {} : { application: 1 });
  assert.equal(sessions.stats.puts.unresumable, version === "TLSv1.3" ? 6 : 3);
  assert.equal(warnings.length, 1);
  assert.match(warnings[0] ?? "", /unlike contexts serve the name "shop.example"/);
});

onBothVersions(
  "of a server with virtual hosts that asks for certificates, names share nothing",
  async (context, target, version) => {
    const warnings: string[] = [];
    const logger = { ...quiet, warn: (line: string) => warnings.push(line) };
    const { port, server, sessions } = await frontend(context, target, { server: demanding, logger });
    server.addContext("bank.example", tls.createSecureContext({ cert: bank, key: bank, ca: client }));
    for (let n = 0; n < 2; n++) {
      const { session } = await visit(port, version, undefined, withCertificate);
      assert(!(await visit(port, version, session, withCertificate)).resumed);
    }
    assert.deepEqual(sessions.stats.misses, { "context-unknown": 2 });
    assert.equal(warnings.length, 1);
  },
);

onBothVersions("a resumed connection that turns out to be another host's ends", async (context, target, version) => {
  let other = false;
  const heard: unknown[] = [];
  const ofBank = tls.createSecureContext({ cert: bank, key: bank });
  const server: tls.TlsOptions = {
    ALPNCallback(this: tls.TLSSocket & { setKeyCert: (context: tls.SecureContext) => void }) {
      if (other) this.setKeyCert(ofBank);
      return "h";
    },
  };
  const { port, sessions, server: listening } = await frontend(context, target, { server });
  if (!("setKeyCert" in tls.TLSSocket.prototype)) {
    context.skip("this Node changes no certificate within a handshake");
    return;
  }
  const options = { ...careless, ALPNProtocols: ["h"] };
  const { session } = await visit(port, version, undefined, options);
  assert((await visit(port, version, session, options)).resumed);
  other = true;
  listening.on("secureConnection", (socket) => heard.push(socket));
  assert(await refused(visit(port, version, session, options)));
  await sessions.flush();
  assert.deepEqual([heard, sessions.stats.terminations], [[], { "context-mismatch": 1 }]);
  assert(!(await visit(port, version, session, options)).resumed);
  assert.deepEqual(sessions.stats.misses, { "context-unstable": 1 });
});

onBothVersions(
  "no session of a renegotiation with a certificate is shared by a server that asks for none",
  async (context, target, version) => {
    if (version === "TLSv1.3") return; // has none
    const { port, server, sessions } = await frontend(context, target, { server: { ca: client } });
    const accepted = once(server, "secureConnection") as Promise<[tls.TLSSocket]>;
    const socket = await connect(port, version, undefined, withCertificate);
    const [here] = await accepted;
    await new Promise<void>((resolve, reject) => {
      here.renegotiate({ requestCert: true, rejectUnauthorized: true }, (error) => {
        if (error) reject(error);
        else resolve();
      });
    });
    assert.equal(here.getPeerCertificate().subject.CN, "client");
    const session = sessionOf(socket);
    socket.destroy();
    await sessions.flush();
    assert.equal(sessions.stats.puts.unresumable, 1);
    assert(!(await visit(port, version, session, careless)).resumed);
  },
);
