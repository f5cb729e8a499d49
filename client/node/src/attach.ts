/** attach(): puts the store under a tls.Server. */
import { AsyncLocalStorage } from "node:async_hooks";
import { constants, createHash } from "node:crypto";
import { errorMonitor, type EventEmitter } from "node:events";
import type { Duplex } from "node:stream";
import type { SecureContextOptions, Server, TLSSocket } from "node:tls";

import { Contexts, type Beginning } from "./contexts.js";
import { ResumedError } from "./errors.js";
import type { Hello } from "./hello.js";
import { Keyring, type Logger } from "./keyring.js";
import { peek } from "./peek.js";
import { ID_BYTES } from "./sealing.js";
import { Session } from "./session.js";
import { Shim } from "./shim.js";
import type { Stats } from "./stats.js";
import { GrpcStore, type Store, type Tls } from "./store.js";

const MAX_LIFETIME = 7 * 24 * 3600; // RFC 8446 section 4.6.1
const CLOSE_MILLISECONDS = 1000;
/** How long a connection may keep its ClientHello to itself; after that TLS waits for it, and does not resume. */
const HELLO_MILLISECONDS = 10_000;

/** Options of {@link attach}. */
export interface Options {
  /** Where the store is, as a gRPC name: `dns:///store:7400`, `127.0.0.1:7400`, `unix:/run/resumed.sock`. */
  target: string;
  /**
   * Who shares these sessions: 1 to 63 characters of [a-z0-9.-]. Within it a session resumes only on a connection with the same
   * server name, certificate names and client authentication. Servers that differ in something else (tenants of one certificate)
   * need different namespaces.
   */
  namespace: string;
  /** The fleet's keys: a keyring file (`resumed keygen`), or a Keyring. */
  keyring: Keyring | string;
  /** Seconds that a session lives from its negotiation on, 1 to 604,800; 7,200 by default. Resuming never prolongs it. */
  lifetime?: number;
  /** Milliseconds that a handshake may wait for the store; 50 by default. */
  deadline?: number;
  /** Whether a session resumes once in the whole fleet (RFC 8446 section 8.1). */
  singleUse?: boolean;
  /**
   * Which ids are looked up: `any`, the only choice. Node cannot choose session ids, so its own are not the fleet's sealed ones;
   * the other frontends of the namespace need `any` as well to resume them.
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
  /** How many look-ups may be under way at once, 64 by default; beyond that handshakes do not ask. */
  maxLookups?: number;
  /** For TLS to the store; none by default. */
  tls?: Tls;
  /** Whether `newSession` and `resumeSession` listeners that the server has are removed. */
  replace?: boolean;
  /** Told of what is worth a human's time; `console` by default. */
  logger?: Logger;
}

/** The sessions of a server. */
export interface Sessions {
  /** What happened since attach(). */
  readonly stats: Stats;
  /** Whether the store kept failing, so that handshakes do not ask it at present. */
  readonly breakerOpen: boolean;
  /** Returns the ids of the sessions that a connection negotiated or resumed, for {@link Sessions.remove}. */
  idsOf(socket: TLSSocket): Buffer[];
  /** Removes a session from the whole fleet, in the background. */
  remove(id: Uint8Array): void;
  /** Resolves to true when all sessions and removals so far are sent, or to false after `timeout` milliseconds (1,000). */
  flush(timeout?: number): Promise<boolean>;
  /**
   * Sends what is not sent yet, for up to a second, and stops. Connections go on; nothing more is stored or resumed by this
   * server.
   */
  close(): Promise<void>;
}

/**
 * Makes a tls, https or http2 server keep its sessions in the store, and resume what any other frontend negotiated. Call it
 * before the first connection.
 *
 * It switches stateless tickets off and sets the session id context and timeout, also of what setSecureContext() sets later.
 *
 * @throws {ResumedError} An option is outside its range, the keyring cannot be used, or the server has session listeners.
 */
export function attach(server: Server, options: Options): Sessions {
  const clock = (): number => Date.now() / 1000;
  const { target, namespace, tls } = options;
  return attachTo(server, options, () => new GrpcStore(target, namespace, tls), clock);
}

/** attach() with a store and a clock (Unix seconds) of the caller's. */
export function attachTo(server: Server, options: Options, open: () => Store, clock: () => number): Sessions {
  const { namespace, logger = console, lifetime = 7200, deadline = 50, maxLookups = 64, puts = "wait" } = options;
  check(/^[a-z0-9.-]{1,63}$/.test(namespace), `namespace must be 1 to 63 characters of [a-z0-9.-], not "${namespace}"`);
  check(
    Number.isInteger(lifetime) && lifetime >= 1 && lifetime <= MAX_LIFETIME,
    `lifetime must be 1 to ${MAX_LIFETIME} whole seconds, not ${lifetime}`,
  );
  check(deadline > 0, `deadline must be above 0 milliseconds, not ${deadline}`);
  check(maxLookups > 0, `maxLookups must be above 0, not ${maxLookups}`);
  check(["wait", "background"].includes(puts), `puts must be "wait" or "background", not "${puts}"`);
  check(
    [undefined, "any"].includes(options.ids),
    'ids must be "any", here and on every other frontend of the namespace: Node cannot choose session ids',
  );
  const keyring = typeof options.keyring === "string" ? Keyring.load(options.keyring, logger) : options.keyring;
  for (const event of ["newSession", "resumeSession"]) {
    check(
      options.replace ?? server.listenerCount(event) === 0,
      `the server has ${event} listeners already; pass replace: true to remove them`,
    );
    server.removeAllListeners(event);
  }
  const policy = { lifetime, deadline, maxLookups, puts, singleUse: options.singleUse ?? false };
  const fleetContext = createHash("sha256").update(namespace).digest();
  const contexts = new Contexts(server, options.ignoreIdContext ? fleetContext : undefined, logger);
  const ownContext = fleetContext.toString("base64url").slice(0, 32);
  return new Attachment(server, ownContext, contexts, new Shim(open(), keyring, policy, logger, clock));
}

/** What is known of a connection. */
interface Connection {
  beginning: Beginning;
  hello: Hello | undefined;
  /** When its ClientHello came, in Unix seconds. */
  began: number;
  /** Of the sessions that it negotiated or resumed. */
  ids: Buffer[];
}

class Attachment implements Sessions {
  readonly #server: Server;
  readonly #shim: Shim;
  readonly #contexts: Contexts;
  /** The session id context of this server, of any session that it resumes: Node takes strings. */
  readonly #ownContext: string;
  /** Node's session events do not say whose they are: the asynchronous context of the connection does. */
  readonly #connections = new AsyncLocalStorage<Connection>();
  readonly #ofSockets = new WeakMap<TLSSocket, Connection>();
  readonly #known = new WeakSet<Duplex>();
  /** Whether clients that speak TLS 1.3 get it here. */
  #speaksTls13 = true;
  #closed = false;

  constructor(server: Server, ownContext: string, contexts: Contexts, shim: Shim) {
    this.#server = server;
    this.#shim = shim;
    this.#contexts = contexts;
    this.#ownContext = ownContext;
    this.#configure();
    this.#followSecureContext();
    this.#followConnections();
    server.on("newSession", (_id: Buffer, serialized: Buffer, done: () => void) => {
      void this.#negotiated(serialized).then(done);
    });
    server.on("resumeSession", (id: Buffer, done: (error: Error | null, session: Buffer | null) => void) => {
      void this.#offered(id).then((session) => {
        done(null, session);
      });
    });
    server.prependListener("secureConnection", (socket: TLSSocket) => {
      this.#secured(socket);
    });
    server.prependListener("tlsClientError", (error: Error, socket: TLSSocket) => {
      if (socket.isSessionReused()) this.#ended(this.#connections.getStore(), error);
    });
  }

  get stats(): Stats {
    return this.#shim.stats;
  }

  get breakerOpen(): boolean {
    return this.#shim.breakerOpen;
  }

  idsOf(socket: TLSSocket): Buffer[] {
    return [...(this.#ofSockets.get(socket)?.ids ?? [])];
  }

  remove(id: Uint8Array): void {
    this.#shim.remove(Buffer.from(id), "application");
  }

  flush(timeout = CLOSE_MILLISECONDS): Promise<boolean> {
    return this.#shim.flush(timeout);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#shim.close(CLOSE_MILLISECONDS);
  }

  #configure(): void {
    const context = this.#contexts.renew();
    // Stateless tickets resume without the store. TLS 1.3 uses stateful ones then, TLS 1.2 session ids.
    context.setOptions(constants.SSL_OP_NO_TICKET);
    context.setSessionTimeout(this.#shim.policy.lifetime);
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

  /** Holds each connection back until its ClientHello is there. Node tells only what a TLS 1.2 client offers. */
  #followConnections(): void {
    const emit = this.#server.emit.bind(this.#server) as (event: string | symbol, ...values: unknown[]) => boolean;
    const held = (event: string | symbol, ...values: unknown[]): boolean => {
      if (event === "secureConnection" && this.#ends(values[0] as TLSSocket)) return true;
      const [stream] = values as [Duplex];
      if (event !== "connection" || this.#closed || this.#known.has(stream)) return emit(event, ...values);
      this.#known.add(stream);
      void peek(stream, HELLO_MILLISECONDS).then((hello) => {
        if (hello === "gone") return;
        const connection = this.#begin(hello);
        if (connection) this.#connections.run(connection, () => emit("connection", stream));
        else emit("connection", stream);
      });
      return true;
    };
    this.#server.emit = held as Server["emit"];
  }

  /** Returns what is known of a connection, or undefined of one that neither stores nor resumes. */
  #begin(hello: Hello | undefined): Connection | undefined {
    try {
      return { hello, beginning: this.#contexts.begin(hello?.serverName ?? ""), began: this.#shim.now(), ids: [] };
    } catch (error) {
      this.#shim.internalError(error);
      return undefined;
    }
  }

  async #negotiated(serialized: Buffer): Promise<void> {
    const connection = this.#connections.getStore();
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
  async #offered(legacyId: Buffer): Promise<Buffer | null> {
    const connection = this.#connections.getStore();
    const id = connection && this.#idIn(connection, legacyId);
    if (!id || this.#closed) return null;
    const session = await this.#shim.lookUp(id, connection.beginning.serverName, connection.beginning.context);
    if (!session) return null;
    connection.ids.push(session.id);
    session.idContext = Buffer.from(this.#ownContext);
    return session.serialize();
  }

  /** Returns the id that OpenSSL is about to ask for. */
  #idIn({ hello }: Connection, legacyId: Buffer): Buffer | undefined {
    if (!hello) return undefined;
    if (!hello.offersTls13 || !this.#speaksTls13) return legacyId;
    // OpenSSL goes on to the next one if it gets no session, but Node can hand out only one.
    return hello.identities.find((identity) => identity.length === ID_BYTES);
  }

  /** Looks at a connection whose handshake is done; ends it, and returns true, if it resumed a session of another context. */
  #ends(socket: TLSSocket): boolean {
    const connection = this.#connections.getStore();
    if (!connection) return false;
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

  #secured(socket: TLSSocket): void {
    const connection = this.#connections.getStore();
    if (!connection) return;
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
