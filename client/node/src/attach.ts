/** attach(): puts the store under a tls.Server. */
import { constants, createHash } from "node:crypto";
import { errorMonitor, type EventEmitter } from "node:events";
import type { Duplex } from "node:stream";
import tls, { type SecureContextOptions, type Server, type TLSSocket } from "node:tls";

import { DEFAULT_ROTATION_SECONDS, TicketSecrets } from "./agreement.js";
import { Contexts, type Beginning } from "./contexts.js";
import { ResumedError } from "./errors.js";
import type { Logger, Reload } from "./files.js";
import { chosenCipher, cipherOf, haveOneHash, isRetried } from "./foreseen.js";
import type { Hello } from "./hello.js";
import { Keyring } from "./keyring.js";
import { peek } from "./peek.js";
import { ID_BYTES } from "./sealing.js";
import { Session } from "./session.js";
import { Shim, type Offer, type Policy } from "./shim.js";
import type { Stats } from "./stats.js";
import { GrpcStore, type Store, type Tls } from "./store.js";
import { MAX_ROTATION_SECONDS } from "./ticket-secret.js";
import { Tickets } from "./tickets.js";
import { emitterOf, keepView, viewOf } from "./view.js";

export const MAX_LIFETIME_SECONDS = 7 * 24 * 3600; // RFC 8446 section 4.6.1
const MAX_DEADLINE_MS = 60_000;
export const DEFAULTS = { lifetimeSeconds: 7200, deadlineMs: 50, maxLookups: 64 };
export const NAMESPACE = /^[a-z0-9.-]{1,63}$/;
const CLOSE_MS = 1000;
/** How long a connection may keep its ClientHello to itself; after that TLS waits for it, and does not resume. */
const HELLO_MS = 10_000;

/** Options of {@link attach}. */
export interface Options {
  /** Where the store is, as a gRPC name: `dns:///store:7400`, `127.0.0.1:7400`, `unix:/run/resumed.sock`. */
  target: string;
  /**
   * The name of the fleet that shares these sessions: 1 to 63 characters of [a-z0-9.-]. Within it a session resumes only on a connection with the same
   * server name, certificate names and client authentication. Servers that differ in something else (tenants of one certificate)
   * need different namespaces.
   */
  namespace: string;
  /** The fleet's keys: a keyring file (`resumed keygen`), or a Keyring. */
  keyring: Keyring | string;
  /**
   * `stored` (the default): the store has the sessions. `tickets`: clients have them, encrypted with a key that the Node servers of the
   * namespace agree on through the store. Such tickets cannot be removed, resume any number of times, and at Node only; those of before are
   * lost at each rotation. A handshake that resumes brings no new ticket. They carry no context: a server with `requestCert`, an `SNICallback` or several contexts is refused.
   */
  sessions?: "stored" | "tickets";
  /** With sessions "tickets": the time for which a key is in use, the same everywhere, 1 to 604,800 seconds; 3,600 by default. */
  rotationSeconds?: number;
  /**
   * With sessions "tickets": whether connections of TLS 1.2 get tickets, too; `false` by default, and then the server needs minVersion
   * "TLSv1.3". In TLS 1.2 the ticket keys open recorded connections, until they are erased.
   */
  ticketsTls12?: boolean;
  /** The lifetime of a session from its negotiation on, 1 to 604,800; 7,200 by default. Resuming never prolongs it. */
  lifetimeSeconds?: number;
  /** The time that a handshake may wait for calls, in all its look-ups together, up to 60,000; 50 by default. */
  deadlineMs?: number;
  /** Whether a session resumes once in the whole fleet (RFC 8446 section 8.1). */
  singleUse?: boolean;
  /**
   * Which ids are looked up: `any`, the only choice. Node cannot choose session ids, so its own are not the fleet's sealed ones. To resume
   * them, the other frontends of the namespace must look up every id as well.
   */
  ids?: "any";
  /**
   * `wait` (the default) holds a full handshake, and nothing else, until its sessions are stored, at most for the deadline: a
   * client that comes back at once is resumed. `background` holds up nothing.
   */
  puts?: "wait" | "background";
  /**
   * Whether servers with unlike session id contexts share sessions; `false` by default: then the server's `sessionIdContext` must be
   * that of the server that negotiated the session, or both have none. Pass `true`, everywhere, where unlike stacks share a
   * namespace (Python, nginx, ...): each has a session id context of its own.
   */
  ignoreIdContext?: boolean;
  /** The number of look-ups that may be under way at once, 64 by default; beyond it a handshake makes none. */
  maxLookups?: number;
  /** For TLS to the store; none by default. Files are read again when they change. */
  tls?: Tls;
  /** Whether `newSession` and `resumeSession` listeners that the server has are removed. */
  replace?: boolean;
  /** Gets a line at an outage, at its end, and at changes of the keyring; `console` by default. */
  logger?: Logger;
}

/** The sessions of a server. */
export interface Installation {
  /** The name of the fleet that shares these sessions. */
  readonly namespace: string;
  /** The counts since attach(). */
  readonly stats: Stats;
  /** Whether the circuit breaker is open, so that handshakes make no look-ups. */
  readonly breakerOpen: boolean;
  /** The state of the keyring file; undefined if the keys are not from a file. */
  readonly keyringReload: Reload | undefined;
  /** The secret that encrypts new tickets; undefined if there is none, or without tickets. */
  readonly ticketSecret: TicketSecretState | undefined;
  /** Returns the ids of the sessions that a connection negotiated or resumed, for {@link Installation.remove}. */
  idsOf(socket: TLSSocket): Buffer[];
  /** Removes a session from the whole fleet, in the background. Here it resumes no more from now on. */
  remove(id: Uint8Array): void;
  /**
   * Resolves when all sessions and removals so far are sent, or after `timeoutMs` (1,000): to whether they were sent in time, and no
   * removal was refused or dropped that was not requested again.
   */
  flush(timeoutMs?: number): Promise<boolean>;
  /**
   * Sends the rest of the queue, for up to a second, and stops. Connections go on; nothing more is stored or resumed by this
   * server.
   */
  close(): Promise<void>;
}

/** The state of the secret that encrypts new tickets. */
export interface TicketSecretState {
  /** The time of its creation, in Unix seconds. */
  created: number;
  /** Whether it is that of an epoch that has ended, since the store did not answer. */
  heldOver: boolean;
}

/**
 * Makes a tls, https or http2 server keep its sessions in the store, and resume the sessions of every other frontend. Call it
 * before the first connection.
 *
 * It switches stateless tickets off and sets the session id context and timeout, also of what setSecureContext() sets later.
 *
 * @throws {ResumedError} An option is outside its range, the keyring cannot be used, or the server has session listeners.
 */
export function attach(server: Server, options: Options): Installation {
  const clock = (): number => Date.now() / 1000;
  const open = (): Store => new GrpcStore(options.target, options.namespace, options.tls, options.logger);
  return attachTo(server, options, open, clock);
}

/** attach() with a store and a clock (Unix seconds) of the caller's. */
export function attachTo(server: Server, options: Options, open: () => Store, clock: () => number): Installation {
  const policy = policyOf(options);
  const { namespace, logger = console, replace = false, ignoreIdContext = false } = options;
  const keyring = typeof options.keyring === "string" ? Keyring.load(options.keyring, logger) : options.keyring;
  const events = ["newSession", "resumeSession"];
  for (const event of events) {
    const free = replace || server.listenerCount(event) === 0;
    check(free, `the server has ${event} listeners already; pass replace: true to remove them`);
  }
  const fleetContext = createHash("sha256").update(namespace).digest();
  const contexts = new Contexts(server, ignoreIdContext ? fleetContext : undefined, logger);
  if (options.sessions === "tickets") {
    const { rotationSeconds = DEFAULT_ROTATION_SECONDS, ticketsTls12 = false } = options;
    check(!policy.singleUse, 'singleUse needs sessions: "stored": Node does not show which ticket a client offers');
    contexts.only(); // refuses a server before there is a connection to the store
    const store = open();
    for (const event of events) server.removeAllListeners(event);
    const secrets = new TicketSecrets(store, keyring, rotationSeconds, policy.lifetimeSeconds, logger, clock);
    const lifetimeSeconds = Math.min(policy.lifetimeSeconds, rotationSeconds); // the next key opens none of its tickets
    return new Tickets(server, contexts, store, secrets, { tls12: ticketsTls12, lifetimeSeconds }, logger, clock);
  }
  const ownContext = fleetContext.toString("base64url").slice(0, 32);
  const shim = new Shim(open(), keyring, policy, logger, clock);
  for (const event of events) server.removeAllListeners(event);
  return new Attachment(server, namespace, ownContext, contexts, shim);
}

/** The check of each option that is present; programs in JavaScript can pass any value. */
const CHECKS: Record<keyof Options, { must: string; holds: (value: unknown) => boolean; required?: true; secret?: true }> = {
  target: { must: 'be the store\'s gRPC name, such as "127.0.0.1:7400"', holds: (value) => isText(value, /./), required: true },
  namespace: {
    must: "be 1 to 63 characters of [a-z0-9.-]",
    holds: (value) => isText(value, NAMESPACE),
    required: true,
  },
  keyring: {
    must: "be a keyring file (make one with `resumed keygen`), or a Keyring",
    holds: (value) => isText(value, /./) || value instanceof Keyring,
    required: true,
    secret: true,
  },
  sessions: { must: 'be "stored" or "tickets"', holds: (value) => value === "stored" || value === "tickets" },
  rotationSeconds: {
    must: `be a whole number from 1 to ${MAX_ROTATION_SECONDS}`,
    holds: (value) => isWhole(value, MAX_ROTATION_SECONDS),
  },
  ticketsTls12: { must: "be true or false", holds: isBoolean },
  lifetimeSeconds: {
    must: `be a whole number from 1 to ${MAX_LIFETIME_SECONDS}`,
    holds: (value) => isWhole(value, MAX_LIFETIME_SECONDS),
  },
  deadlineMs: {
    must: `be a number above 0, at most ${MAX_DEADLINE_MS}`,
    holds: (value) => typeof value === "number" && value > 0 && value <= MAX_DEADLINE_MS,
  },
  singleUse: { must: "be true or false", holds: isBoolean },
  ids: {
    must: 'be "any", here and on every other frontend of the namespace: Node cannot choose session ids',
    holds: (value) => value === "any",
  },
  puts: { must: 'be "wait" or "background"', holds: (value) => value === "wait" || value === "background" },
  ignoreIdContext: { must: "be true or false", holds: isBoolean },
  maxLookups: { must: "be a whole number above 0", holds: (value) => isWhole(value, Number.MAX_SAFE_INTEGER) },
  tls: { must: "have `ca`, and `cert` and `key` or neither, each a PEM file or its content", holds: isTls, secret: true },
  replace: { must: "be true or false", holds: isBoolean },
  logger: {
    must: "have the methods info, warn and error",
    holds: (value) => ["info", "warn", "error"].every((name) => typeof (value as Record<string, unknown>)[name] === "function"),
  },
};

function policyOf(options: Options): Policy {
  check(typeof options === "object" && (options as unknown) !== null, "attach() needs options: see Options");
  for (const name of Object.keys(options)) check(Object.hasOwn(CHECKS, name), `there is no option ${name}`);
  for (const [name, { must, holds, required, secret }] of Object.entries(CHECKS)) {
    const value: unknown = options[name as keyof Options];
    if (value === undefined && !required) continue;
    const shown = typeof value === "string" ? JSON.stringify(value) : String(value);
    const wrong = value !== undefined && secret ? "" : `, not ${shown}`;
    check(value !== undefined && value !== null && holds(value), `${name} must ${must}${wrong}`);
  }
  const { puts = "wait", singleUse = false } = options;
  const { lifetimeSeconds = DEFAULTS.lifetimeSeconds, deadlineMs = DEFAULTS.deadlineMs } = options;
  const { maxLookups = DEFAULTS.maxLookups } = options;
  return { lifetimeSeconds, deadlineMs, maxLookups, puts, singleUse };
}

function isText(value: unknown, pattern: RegExp): boolean {
  return typeof value === "string" && pattern.test(value);
}

function isWhole(value: unknown, largest: number): boolean {
  return Number.isInteger(value) && (value as number) >= 1 && (value as number) <= largest;
}

function isBoolean(value: unknown): boolean {
  return typeof value === "boolean";
}

function isTls(value: unknown): boolean {
  const { ca, cert, key } = value as Partial<Record<keyof Tls, unknown>>;
  const isPem = (each: unknown): boolean => isText(each, /./) || Buffer.isBuffer(each);
  return isPem(ca) && (cert === undefined && key === undefined ? true : isPem(cert) && isPem(key));
}

/** The state of a connection. */
interface Connection {
  beginning: Beginning;
  hello: Hello | undefined;
  /** When its ClientHello came, in Unix seconds. */
  began: number;
  /** Of the sessions that it negotiated or resumed. */
  ids: Buffer[];
  /** What OpenSSL has not decided about yet. */
  found?: Offer | undefined;
}

class Attachment implements Installation {
  readonly namespace: string;
  readonly #server: Server & { ciphers?: string; ecdhCurve?: string; honorCipherOrder?: boolean };
  readonly #shim: Shim;
  readonly #contexts: Contexts;
  /** The session id context of this server, of any session that it resumes: Node takes strings. */
  readonly #ownContext: string;
  readonly #ofSockets = new WeakMap<TLSSocket, Connection>();
  readonly #known = new WeakSet<Duplex>();
  /** Whether clients that speak TLS 1.3 get it here. */
  #speaksTls13 = true;
  #closed = false;

  constructor(server: Server, namespace: string, ownContext: string, contexts: Contexts, shim: Shim) {
    this.namespace = namespace;
    this.#server = server;
    this.#shim = shim;
    this.#contexts = contexts;
    this.#ownContext = ownContext;
    this.#configure();
    this.#followSecureContext();
    this.#followConnections();
    // Node has sessions only for a server with listeners. Those of connections that begin now do not get here.
    server.on("newSession", (_id: Buffer, _session: Buffer, done: () => void) => {
      done();
    });
    server.on("resumeSession", (_id: Buffer, done: (error: Error | null, session: Buffer | null) => void) => {
      done(null, null);
    });
  }

  get stats(): Stats {
    return this.#shim.stats;
  }

  get breakerOpen(): boolean {
    return this.#shim.breakerOpen;
  }

  get keyringReload(): Reload | undefined {
    return this.#shim.keyringReload;
  }

  readonly ticketSecret = undefined;

  idsOf(socket: TLSSocket): Buffer[] {
    return [...(this.#ofSockets.get(socket)?.ids ?? [])];
  }

  remove(id: Uint8Array): void {
    this.#shim.remove(Buffer.from(id), "application");
  }

  flush(timeout = CLOSE_MS): Promise<boolean> {
    return this.#shim.flush(timeout);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#shim.close(CLOSE_MS);
  }

  #configure(): void {
    const context = this.#contexts.renew();
    // Stateless tickets resume without the store. TLS 1.3 uses stateful ones then, TLS 1.2 session ids.
    context.setOptions(constants.SSL_OP_NO_TICKET);
    context.setSessionTimeout(this.#shim.policy.lifetimeSeconds);
    context.setSessionIdContext(this.#ownContext);
  }

  /** Certificates are renewed by setSecureContext(), which makes a new context. */
  #followSecureContext(): void {
    const setSecureContext = this.#server.setSecureContext.bind(this.#server);
    this.#server.setSecureContext = (options: SecureContextOptions): void => {
      setSecureContext(options);
      this.#configure();
    };
  }

  /** Holds each connection back until its ClientHello is there. Node shows only the session that a TLS 1.2 client offers. */
  #followConnections(): void {
    const server = this.#server;
    const emit = emitterOf(server);
    const held = (event: string | symbol, ...values: unknown[]): boolean => {
      const [stream] = values as [Duplex];
      if (event !== "connection" || this.#closed || this.#known.has(stream)) return emit(server, event, ...values);
      this.#known.add(stream);
      void peek(stream, HELLO_MS).then((hello) => {
        if (hello === "gone") return;
        const connection = this.#begin(hello);
        const view = viewOf(server, (own, ...of) => {
          const heard = this.#intercepts(connection, own, of) || emit(server, own, ...of);
          if (own === "secureConnection") keepView(of[0] as TLSSocket, view);
          return heard;
        });
        emit(view, "connection", stream);
      });
      return true;
    };
    server.emit = held as Server["emit"];
  }

  /** Handles an event of a connection, and returns whether the server does not get it. */
  #intercepts(connection: Connection | undefined, event: string | symbol, values: unknown[]): boolean {
    if (event === "newSession") {
      const [, serialized, done] = values as [Buffer, Buffer, () => void];
      void this.#negotiated(connection, serialized).then(done);
      return true;
    }
    if (event === "resumeSession") {
      const [id, done] = values as [Buffer, (error: Error | null, session: Buffer | null) => void];
      void this.#offered(connection, id).then((session) => {
        done(null, session);
      });
      return true;
    }
    if (event === "secureConnection") {
      const [socket] = values as [TLSSocket];
      if (!connection) return false;
      if (this.#ends(connection, socket)) return true;
      this.#secured(connection, socket);
    } else if (event === "tlsClientError") {
      const [error, socket] = values as [Error, TLSSocket];
      if (socket.isSessionReused()) this.#ended(connection, error);
    }
    return false;
  }

  /** Returns the state of a connection, or undefined for one that neither stores nor resumes. */
  #begin(hello: Hello | undefined): Connection | undefined {
    try {
      return { hello, beginning: this.#contexts.begin(hello?.serverName ?? ""), began: this.#shim.now(), ids: [] };
    } catch (error) {
      this.#shim.internalError(error);
      return undefined;
    }
  }

  async #negotiated(connection: Connection | undefined, serialized: Buffer): Promise<void> {
    if (this.#closed) return;
    try {
      const { beginning, began = 0 } = connection ?? {};
      const session = connection?.hello && Session.parse(serialized);
      if (session) {
        session.hostName = connection.beginning.serverName;
        connection.ids.push(session.id);
      }
      await this.#shim.negotiated(session, beginning?.context ?? "context-unknown", began);
    } catch (error) {
      this.#shim.internalError(error);
    }
  }

  /** Resolves to the session that a client offered. */
  async #offered(connection: Connection | undefined, legacyId: Buffer): Promise<Buffer | null> {
    const id = connection && this.#idIn(connection, legacyId);
    if (!id || this.#closed) return null;
    const { serverName, context } = connection.beginning;
    const found = await this.#shim.lookUp(id, serverName, context, this.#cipherOf(connection));
    if (!found) return null;
    const { session } = found;
    connection.found = found;
    connection.ids.push(session.id);
    session.idContext = Buffer.from(this.#ownContext);
    return session.serialize();
  }

  /** Returns the cipher of TLS 1.3 that this connection will have, as far as that shows. */
  #cipherOf({ hello }: Connection): number | undefined {
    if (!hello || !this.#takesTls13(hello)) return undefined;
    return chosenCipher(hello, this.#server.ciphers ?? tls.DEFAULT_CIPHERS, this.#server.honorCipherOrder ?? true);
  }

  #takesTls13(hello: Hello): boolean {
    return hello.offersTls13 && this.#speaksTls13;
  }

  /** Returns the id that OpenSSL is about to ask for. */
  #idIn({ hello }: Connection, legacyId: Buffer): Buffer | undefined {
    if (!hello) return undefined;
    if (!this.#takesTls13(hello)) return legacyId;
    // OpenSSL goes on to the next one if it gets no session, but Node can hand out only one.
    const id = hello.identities.find((identity) => identity.length === ID_BYTES);
    if (!id || !isRetried(hello, this.#server.ecdhCurve ?? tls.DEFAULT_ECDH_CURVE)) return id;
    // OpenSSL asks for it again then, when Node has nothing to hand out any more: a single use would be spent for nothing.
    this.#shim.missed("not-resumed");
    return undefined;
  }

  /** Counts what became of the session that was found. */
  #settle(socket: TLSSocket, connection: Connection): void {
    const { found } = connection;
    if (!found) return;
    connection.found = undefined;
    if (socket.isSessionReused()) {
      this.#shim.resumed(found);
      return;
    }
    const shown = socket.getCipher() as { standardName: string } | null; // of a connection that is gone there is none
    const cipher = cipherOf(shown?.standardName);
    const otherHash = cipher !== undefined && !haveOneHash(found.session.cipher, cipher);
    this.#shim.missed(otherHash ? "other-cipher" : "not-resumed");
  }

  /** Looks at a connection whose handshake is done; ends it, and returns true, if it resumed a session of another context. */
  #ends(connection: Connection, socket: TLSSocket): boolean {
    this.#settle(socket, connection);
    const { beginning, ids } = connection;
    const resumed = socket.isSessionReused();
    try {
      if (resumed && this.#contexts.allows(socket, beginning)) return false;
      if (!resumed && this.#contexts.afterFullHandshake(socket, beginning)) return false;
    } catch (error) {
      this.#shim.internalError(error);
    }
    for (const id of resumed ? ids.slice(1) : ids) this.#shim.remove(id, "application"); // those that it negotiated
    if (!resumed) return false;
    beginning.context = "context-unstable";
    this.#contexts.distrust(beginning.serverName);
    this.#shim.terminated("context-mismatch");
    socket.destroy();
    return true;
  }

  #secured(connection: Connection, socket: TLSSocket): void {
    this.#ofSockets.set(socket, connection);
    if (connection.hello?.offersTls13) this.#speaksTls13 = socket.getProtocol() === "TLSv1.3";
    (socket as EventEmitter).on(errorMonitor, (error: Error) => {
      this.#ended(connection, error);
    });
  }

  /** After a fatal alert, sent or received, a session must not be resumed (RFC 5246 section 7.2.2); after a cut it may. */
  #ended(connection: Connection | undefined, error: NodeJS.ErrnoException): void {
    if (!error.code?.startsWith("ERR_SSL_") || error.code === "ERR_SSL_UNEXPECTED_EOF_WHILE_READING") return;
    for (const id of connection?.ids ?? []) this.#shim.remove(id, "fatal-error");
  }
}

function check(holds: boolean, complaint: string): asserts holds {
  if (!holds) throw new ResumedError(complaint);
}
