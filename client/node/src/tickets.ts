/**
 * Sessions as tickets: the server encrypts its tickets with a key that all Node servers of the namespace have, and takes part in the
 * agreement on it. Node has one ticket key at a time, and shows neither the tickets nor their content.
 */
import { constants, createHash, randomBytes } from "node:crypto";
import type { SecureContextOptions, Server, TLSSocket } from "node:tls";

import type { TicketSecrets } from "./agreement.js";
import type { Installation, TicketSecretState } from "./attach.js";
import type { Beginning, Contexts, NativeContext } from "./contexts.js";
import { ResumedError } from "./errors.js";
import type { Logger, Reload } from "./files.js";
import { PurgeWatch } from "./purge-watch.js";
import { Recorder, type Stats } from "./stats.js";
import type { Store } from "./store.js";
import type { TicketSecret } from "./ticket-secret.js";
import { emitterOf, viewOf } from "./view.js";

const TLS13 = 0x0304;

export interface TicketOptions {
  /** Whether connections of TLS 1.2 get tickets, too. */
  tls12: boolean;
  /** The longest life of a ticket, in seconds. */
  lifetimeSeconds: number;
}

export class Tickets implements Installation {
  readonly namespace: string;
  readonly #server: Server & { secureOptions?: number };
  readonly #contexts: Contexts;
  readonly #store: Store;
  readonly #secrets: TicketSecrets;
  readonly #options: TicketOptions;
  readonly #logger: Logger;
  readonly #clock: () => number;
  readonly #recorder = new Recorder();
  readonly #purges: PurgeWatch;
  #applied: TicketSecret | undefined;
  #timer: NodeJS.Timeout | undefined;
  /** The step of the agreement that is under way. */
  #step = Promise.resolve();
  #closed = false;

  /** @throws {ResumedError} The server needs a rule about contexts that a ticket of Node cannot carry. */
  constructor(
    server: Server,
    contexts: Contexts,
    store: Store,
    secrets: TicketSecrets,
    options: TicketOptions,
    logger: Logger,
    clock: () => number,
  ) {
    this.namespace = store.namespace;
    this.#server = server;
    this.#contexts = contexts;
    this.#store = store;
    this.#secrets = secrets;
    this.#options = options;
    this.#logger = logger;
    this.#clock = clock;
    this.#purges = new PurgeWatch(store, logger, (before) => {
      this.#run(() => {
        this.#secrets.forget(before);
        this.#apply();
      });
    });
    this.#configure();
    this.#follow();
    this.#run();
  }

  get stats(): Stats {
    return this.#recorder.snapshot();
  }

  /** False: no handshake makes a call. */
  readonly breakerOpen = false;

  get keyringReload(): Reload | undefined {
    return this.#secrets.keyringReload;
  }

  get ticketSecret(): TicketSecretState | undefined {
    const current = this.#secrets.current(this.#clock());
    return current && { created: current.secret.created, heldOver: current.heldOver };
  }

  idsOf(): Buffer[] {
    return [];
  }

  remove(): never {
    throw new ResumedError('a ticket of Node cannot be removed; use sessions: "stored", or end all by `resumed purge`');
  }

  flush(): Promise<boolean> {
    return Promise.resolve(true);
  }

  close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#purges.end();
    this.#apply();
    this.#store.close();
    return Promise.resolve();
  }

  /** Brings the server's context up to date, which setSecureContext() replaces. */
  #configure(): void {
    const { native, binding } = this.#contexts.only();
    this.#verify(native);
    native.setSessionTimeout(this.#options.lifetimeSeconds);
    // OpenSSL compares it with that in the ticket: a ticket resumes only where the names and the client authentication are the same.
    native.setSessionIdContext(createHash("sha256").update(this.namespace).update(binding).digest("base64url").slice(0, 32));
    this.#applied = undefined;
    this.#apply();
  }

  #verify(native: NativeContext): void {
    if ((this.#server.secureOptions ?? 0) & constants.SSL_OP_NO_TICKET) {
      throw new ResumedError('the server\'s secureOptions switch tickets off (SSL_OP_NO_TICKET); use sessions: "stored"');
    }
    if (!this.#options.tls12 && !(native.getMinProto() >= TLS13)) {
      throw new ResumedError(
        "Node issues tickets in TLS 1.2 as well, where the fleet's ticket keys open recorded connections: " +
          'create the server with minVersion: "TLSv1.3", or pass ticketsTls12: true',
      );
    }
  }

  #follow(): void {
    const setSecureContext = this.#server.setSecureContext.bind(this.#server);
    const addContext = this.#server.addContext.bind(this.#server);
    const server = this.#server;
    const emit = emitterOf(server);
    this.#server.setSecureContext = (options: SecureContextOptions): void => {
      setSecureContext(options);
      this.#configure();
    };
    this.#server.addContext = (...given: Parameters<Server["addContext"]>): void => {
      addContext(...given);
      this.#contexts.only(); // throws
    };
    server.emit = ((event: string | symbol, ...values: unknown[]): boolean => {
      if (event !== "connection") return emit(server, event, ...values);
      this.#watch();
      const beginning = this.#contexts.begin("");
      const view = viewOf(server, (own, ...of) => {
        return (own === "secureConnection" && this.#ends(beginning, of[0] as TLSSocket)) || emit(server, own, ...of);
      });
      return emit(view, event, ...values);
    }) as Server["emit"];
    // In a cluster a worker gets the keys of the primary process when it listens.
    this.#server.prependListener("listening", () => {
      this.#applied = undefined;
      this.#apply();
      this.#watch();
    });
    if (this.#server.listening) this.#watch();
    this.#server.on("close", () => {
      this.#purges.end(); // a program whose servers are closed may end
    });
  }

  #watch(): void {
    if (!this.#closed) this.#purges.begin();
  }

  /** Takes the next step of the agreement, behind that which is under way, and the one after when it is due. */
  #run(before?: () => void): void {
    this.#step = this.#step.then(async () => {
      clearTimeout(this.#timer);
      before?.();
      const pause = await this.#secrets.step();
      if (this.#closed) return;
      this.#apply();
      this.#timer = setTimeout(() => {
        this.#run();
      }, pause).unref();
    });
  }

  /** Gives the server the key to encrypt with; without one, a key of its own that no other server has. */
  #apply(): void {
    const current = this.#closed ? undefined : this.#secrets.current(this.#clock());
    if (current && current.secret === this.#applied) return;
    if (current || this.#applied || this.#closed) this.#server.setTicketKeys(current?.secret.raw48 ?? randomBytes(48));
    if (current) {
      const name = current.secret.name.toString("hex");
      this.#logger.info(`resumed: namespace ${this.namespace}: tickets are encrypted with the key ${name}`);
    }
    this.#applied = current?.secret;
  }

  /** Counts a connection whose handshake is done; ends it, and returns true, if it resumed a session of another context. */
  #ends(beginning: Beginning, socket: TLSSocket): boolean {
    if (!socket.isSessionReused()) return false;
    if (this.#contexts.allows(socket, beginning)) {
      this.#recorder.count("ticketsResumed", "current");
      return false;
    }
    this.#recorder.count("terminations", "context-mismatch");
    socket.destroy();
    return true;
  }
}
