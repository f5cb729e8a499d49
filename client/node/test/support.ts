/** Support of the tests: a real store in a process of its own, servers and clients in this one. */
import { execFileSync, spawn, spawnSync, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { after, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import tls from "node:tls";

import { attachTo } from "../src/attach.js";
import type { Options, Installation } from "../src/index.js";
import { Keyring } from "../src/keyring.js";
import { Session } from "../src/session.js";
import { GrpcStore, type Store } from "../src/store.js";

/** Milliseconds that bound every wait; only defects take that long. */
export const PATIENCE = 30_000;
export const VERSIONS = ["TLSv1.2", "TLSv1.3"] as const;
export type Version = (typeof VERSIONS)[number];

/** This file is compiled into .build/test. */
export const REPOSITORY = join(__dirname, "../../../..");

export const directory = mkdtempSync(join(tmpdir(), "resumed-node-"));
after(() => {
  rmSync(directory, { recursive: true });
});

/** Returns the file with a certificate for these names, its own authority, and its key. */
export function certificateFile(names: string[], days = 30): string {
  const path = mkdtempSync(join(directory, "certificate-"));
  const [cert, key] = [join(path, "cert.pem"), join(path, "key.pem")];
  execFileSync(
    "openssl",
    ["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", String(days)]
      .concat(["-subj", `/CN=${names[0]}`, "-addext", `subjectAltName=${names.map((name) => `DNS:${name}`).join()}`])
      .concat(["-keyout", key, "-out", cert]),
    { stdio: "ignore" },
  );
  writeFileSync(cert, readFileSync(key), { flag: "a" });
  return cert;
}

export const certificate = certificateFile(["shop.example", "bank.example"]);
export const pem = readFileSync(certificate, "utf8");

export const fleetKey = Buffer.alloc(32, 1);

export function keyringFile(...keys: Buffer[]): string {
  const path = join(mkdtempSync(join(directory, "keys-")), "fleet.keys");
  writeFileSync(path, keys.map((each) => `${each.toString("base64")}\n`).join(""));
  chmodSync(path, 0o600);
  return path;
}

const command = process.env.RESUMED_COMMAND ?? "resumed";
/** Why tests that need a store are skipped, if they are. */
export const skip =
  spawnSync(command, ["--help"]).status === 0 ? false : "needs a store: the resumed command in PATH or RESUMED_COMMAND";

const children: ChildProcess[] = [];
after(() => {
  for (const signal of ["SIGCONT", "SIGTERM"] as const) for (const child of children) child.kill(signal);
});

export interface RunningStore {
  target: string;
  process: ChildProcess;
}

/** A store that is ready. */
export async function startStore(): Promise<RunningStore> {
  const options = ["serve", "--listen", "127.0.0.1:0", "--workers", "1", "--shutdown-delay", "0s"];
  const child = spawn(command, options, { stdio: ["ignore", "ignore", "pipe"] });
  children.push(child);
  let target = "";
  for await (const line of createInterface(child.stderr)) {
    const { event, addresses } = JSON.parse(line) as { event?: string; addresses?: [string] };
    if (event === "listening" && addresses) target = addresses[0];
    if (event === "ready") break;
  }
  child.stderr.resume();
  return { target, process: child };
}

let shared: Promise<RunningStore> | undefined;
/** The store of all tests of a file that do not harm it. */
export function sharedStore(): Promise<RunningStore> {
  return (shared ??= startStore());
}

/** Ends all sessions of a namespace. */
export function purge(target: string, namespace: string): void {
  execFileSync(command, ["purge", "--yes", target, namespace], { stdio: ["ignore", "ignore", "inherit"] });
}

export const quiet = { info: ignore, warn: ignore, error: ignore };
function ignore(): void {
  // without a reader
}

export function notCalled(): never {
  throw new Error("not called");
}

/** A store that passes calls on, except for those in `given`. */
export function forwarding(store: Store, given: Partial<Store> = {}): Store {
  return {
    namespace: store.namespace,
    get: (key, timeout) => store.get(key, timeout),
    take: (key, timeout) => store.take(key, timeout),
    batch: (operations, timeout) => store.batch(operations, timeout),
    watchRemovals: () => store.watchRemovals(),
    close: () => {
      store.close();
    },
    ...given,
  };
}

export interface Frontend {
  server: tls.Server;
  port: number;
  sessions: Installation;
}

type Extras = Partial<Options> & { clock?: () => number; store?: (store: Store) => Store; server?: tls.TlsOptions };

/** A server on the loopback interface that gives each connection one byte. */
export async function frontend(context: TestContext, target: string, extras: Extras = {}): Promise<Frontend> {
  const { clock = () => Date.now() / 1000, store = (each: Store) => each, server: serverOptions, ...given } = extras;
  const server = tls.createServer({ cert: pem, key: pem, ...serverOptions }, (socket) => {
    socket.on("error", ignore).resume().write("x");
  });
  const options: Options = {
    target,
    namespace: "shop",
    keyring: Keyring.fromKeys(fleetKey),
    deadlineMs: 5000, // the machine may be busy; tests of the deadline set theirs
    logger: quiet,
    ...given,
  };
  const sessions = attachTo(server, options, () => store(new GrpcStore(target, options.namespace)), clock);
  const port = await listen(context, server);
  context.after(() => sessions.close());
  return { server, port, sessions };
}

export async function listen(context: TestContext, server: tls.Server): Promise<number> {
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const connections = new Set<tls.TLSSocket>();
  server.on("secureConnection", (socket) => connections.add(socket));
  context.after(() => {
    server.close();
    for (const each of connections) each.destroy();
  });
  return (server.address() as AddressInfo).port;
}

export interface Visit {
  resumed: boolean;
  session: Buffer | undefined;
}

/** Connects, waits for the first byte (and for a ticket), and leaves without close_notify. */
export async function visit(
  port: number,
  version: Version,
  session?: Buffer,
  options: tls.ConnectionOptions = {},
  ticket?: boolean,
): Promise<Visit> {
  const socket = await connect(port, version, session, options, ticket);
  const result = { resumed: socket.isSessionReused(), session: sessionOf(socket) };
  socket.destroy();
  return result;
}

/** A connection that has received its first byte, and its first ticket if `ticket`. */
export async function connect(
  port: number,
  version: Version,
  session?: Buffer,
  options: tls.ConnectionOptions = {},
  ticket = version === "TLSv1.3",
): Promise<tls.TLSSocket> {
  const socket = tls.connect({
    port,
    host: "127.0.0.1",
    ca: pem,
    servername: "shop.example",
    minVersion: version,
    maxVersion: version,
    ...(session && { session }),
    ...options,
  });
  socket.on("session", (ticket: Buffer) => tickets.set(socket, ticket));
  socket.write("hello\n"); // Python's frontend speaks when it is spoken to
  socket.setTimeout(PATIENCE, () => socket.destroy(new Error("the server says nothing")));
  // In TLS 1.3 a server may send its first bytes before its tickets.
  const closed = once(socket, "close").then(() => Promise.reject(new Error("the server closed the connection")));
  closed.catch(ignore);
  await Promise.race([closed, Promise.all([once(socket, "data"), ticket && once(socket, "session")])]);
  return socket;
}

const tickets = new WeakMap<tls.TLSSocket, Buffer>();

/** The session that a client can resume. */
export function sessionOf(socket: tls.TLSSocket): Buffer | undefined {
  return socket.getProtocol() === "TLSv1.3" ? tickets.get(socket) : socket.getSession();
}

/** Where OpenSSL's serialization of a client's session begins: newer Nodes put the server's name, and more, before it. */
function start(session: Buffer): number {
  return session.indexOf(Buffer.from([0x30, 0x82]));
}

/** OpenSSL's serialization of a client's session. */
export function bare(session: Buffer | undefined): Buffer {
  if (!session) throw new Error("the client has no session");
  return session.subarray(start(session));
}

/** A client's session for shop.example as one for another name: newer clients offer none for a name that is not its own. */
export function renamed(session: Buffer | undefined, name: "bank.example" | "SHOP.example"): Buffer {
  const inner = Session.parse(bare(session));
  if (!session || !inner) throw new Error("not a session");
  inner.hostName = name;
  const before = session.toString("latin1", 0, start(session)).replace("shop.example", name);
  return Buffer.concat([Buffer.from(before, "latin1"), inner.serialize()]);
}

export function total(counts: Record<string, number>): number {
  return Object.values(counts).reduce((sum, each) => sum + each, 0);
}

/** Waits until something of another process, or of the event loop, is so. */
export async function eventually(what: string, is: () => boolean | Promise<boolean>): Promise<void> {
  const end = Date.now() + PATIENCE;
  while (!(await is())) {
    if (Date.now() > end) throw new Error(`never happened: ${what}`);
    await sleep(5);
  }
}
