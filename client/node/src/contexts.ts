/** Which context serves a connection, as far as Node shows it. */
import { createHash, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import tls, { type SecureContextOptions, type Server, type TLSSocket } from "node:tls";

import { ResumedError } from "./errors.js";
import { clientAuthentication, NO_CLIENT_AUTHENTICATION, serverIdentity } from "./fingerprint.js";
import type { Logger } from "./files.js";

/** Names that are remembered; any client can bring new ones. */
const MAX_NAMES = 10_000;
/** The session id context in stored sessions of servers that set none: Node makes one of the process's arguments. */
const DEFAULT_ID_CONTEXT = createHash("sha256").update("resumed/v1 node default session id context").digest();

/** What must be equal for a session to resume. */
export interface Context {
  fingerprint: Buffer;
  /** In stored sessions. */
  idContext: Buffer;
  /** Whether its sessions have a client's certificate, a verified one. */
  certificates: boolean;
}

/** Why nothing can be said of a connection: the reason under which its look-up is counted. */
export type Unknown = "context-unknown" | "context-unstable";

/** node:tls' SecureContext in C++. */
export interface NativeContext {
  setOptions(options: number): void;
  setSessionIdContext(context: string): void;
  setSessionTimeout(seconds: number): void;
  getCertificate(): Buffer | null;
  /** The oldest version of TLS, as on the wire. */
  getMinProto(): number;
}

/** A server's properties, as node:tls sets them of its options and of those of setSecureContext(). */
type Properties = Server &
  Pick<SecureContextOptions, "ca" | "cert" | "crl" | "pfx" | "sessionIdContext"> & {
    requestCert: boolean;
    rejectUnauthorized: boolean;
    _sharedCreds: { context: NativeContext };
    _contexts?: unknown[];
  };

/** The state of a connection at its ClientHello; `context` changes when it turns out to be another one. */
export interface Beginning {
  serverName: string;
  context: Context | Unknown;
  base: Base;
}

/** One secure context of the server. */
interface Base {
  native: NativeContext;
  /** How many contexts addContext() had added. */
  added: number;
  /** DER of the certificates that it can show. */
  leaves: Buffer[];
  identity: Buffer;
  idContext: Buffer;
  /** By whether certificates that do not verify are rejected. */
  clientAuthentications: Map<boolean, Buffer>;
}

export class Contexts {
  readonly #server: Properties;
  readonly #fleetIdContext: Buffer | undefined;
  readonly #logger: Logger;
  /** The private property of a server that has its SNICallback. */
  readonly #sniCallback: symbol | undefined;
  #base: Base | undefined;
  /** Identities that full handshakes for a name ended with, where the server has contexts that it chooses by name. */
  readonly #learned = new Map<string, Buffer>();
  readonly #unstable = new Set<string>();
  #complained = false;

  /** @param fleetIdContext In all sessions that are stored; undefined: the server's own. */
  constructor(server: Server, fleetIdContext: Buffer | undefined, logger: Logger) {
    this.#server = server as Properties;
    this.#fleetIdContext = fleetIdContext;
    this.#logger = logger;
    this.#sniCallback = Object.getOwnPropertySymbols(server).find(({ description }) => description === "snicallback");
  }

  /** Looks again which context new connections get, and returns it. */
  renew(): NativeContext {
    return this.#current().native;
  }

  /**
   * Returns the only context of a server, and the bytes that its session id context must bind: a ticket of Node carries nothing else.
   *
   * @throws {ResumedError} The server has several, or asks for certificates.
   */
  only(): { native: NativeContext; binding: Buffer } {
    const remedy = 'use sessions: "stored" for this server';
    if (this.#choosesByName) {
      throw new ResumedError(
        `the server chooses contexts by name (SNICallback, addContext), which tickets of Node do not carry; ${remedy}`,
      );
    }
    if (this.#server.requestCert) {
      throw new ResumedError(
        `the server asks for certificates (requestCert), which tickets of Node would not verify again; ${remedy}`,
      );
    }
    const base = this.#current();
    const context = this.#contextOf("", base);
    if (typeof context === "string") throw new ResumedError(`the context of the server is not known (${context}); ${remedy}`);
    return { native: base.native, binding: Buffer.concat([context.fingerprint, context.idContext]) };
  }

  get #native(): NativeContext {
    // Node has no other way to a server's context, nor to change it but to make it anew of all its options, which it does not tell.
    const { context } = (this.#server as Partial<Properties>)._sharedCreds ?? {};
    if (typeof context?.setOptions !== "function" || typeof context.getCertificate !== "function") {
      throw new ResumedError(
        `the TLS context of this server is not where Node ${process.version} was expected to keep it; please report this`,
      );
    }
    return context;
  }

  /** Returns in which context a connection is that begins now and asks for this name. */
  begin(serverName: string): Beginning {
    const base = this.#current();
    return { serverName, base, context: this.#contextOf(serverName, base) };
  }

  #contextOf(serverName: string, base: Base): Context | Unknown {
    const { requestCert } = this.#server;
    let { identity }: { identity: Buffer | undefined } = base;
    if (this.#unstable.has(serverName)) return "context-unstable";
    if (serverName && this.#choosesByName) {
      if (requestCert) {
        this.#complain("it asks for certificates, and chooses contexts by name, whose authorities Node does not show");
        return "context-unknown";
      }
      identity = this.#learned.get(serverName);
    }
    if (!identity) return "context-unknown";
    const fingerprint = Buffer.concat([identity, this.#clientAuthentication(base)]);
    return { fingerprint, idContext: base.idContext, certificates: requestCert };
  }

  /**
   * Looks at a full handshake that is done, and learns which identity its name has.
   *
   * @returns Whether the sessions that it has negotiated so far belong to the context under which they were stored.
   */
  afterFullHandshake(socket: TLSSocket, beginning: Beginning): boolean {
    const { serverName, context, base } = beginning;
    const identity = this.#shownBy(socket, base);
    if (typeof context === "object") {
      if (context.fingerprint.subarray(0, identity.length).equals(identity)) return true;
      this.distrust(serverName);
      beginning.context = "context-unstable";
      return false;
    }
    if (context === "context-unknown" && base === this.#base) {
      const [oldest] = this.#learned.keys();
      if (oldest !== undefined && this.#learned.size >= MAX_NAMES) this.#learned.delete(oldest);
      this.#learned.set(serverName, identity);
      beginning.context = this.#contextOf(serverName, base); // tickets of TLS 1.3 come after the handshake
    }
    return true;
  }

  /** Whether a connection that resumed a session has the context of the session, as far as Node shows it. */
  allows(socket: TLSSocket, { context, base }: Beginning): boolean {
    if (typeof context !== "object") return false;
    const hasCertificate = socket.getPeerX509Certificate() !== undefined;
    if (hasCertificate !== context.certificates || (hasCertificate && !socket.authorized)) return false;
    // Node calls no SNICallback on resumption: the certificate is the server's own, unless an ALPNCallback has set another.
    return this.#shownBy(socket, base) === base.identity;
  }

  /** Nothing is stored or resumed for this name any more: its context is chosen by something else than the name. */
  distrust(serverName: string): void {
    if (this.#unstable.size >= MAX_NAMES || this.#unstable.has(serverName)) return;
    this.#unstable.add(serverName);
    const name = JSON.stringify(serverName);
    this.#logger.warn(`resumed: unlike contexts serve the name ${name}: its sessions do not resume in this process any more`);
  }

  /** Returns the identity of the certificate that a connection shows. */
  #shownBy(socket: TLSSocket, { leaves, identity }: Base): Buffer {
    if (this.#hasOneCertificate) return identity; // to get it takes as long as to seal a session
    const raw = socket.getX509Certificate()?.raw;
    return !raw || leaves.some((leaf) => leaf.equals(raw)) ? identity : serverIdentity([raw]);
  }

  /** Whether nothing can set another certificate for a connection: that takes a callback, or a listener that gets its socket. */
  get #hasOneCertificate(): boolean {
    const server = this.#server as { ALPNCallback?: unknown };
    const hasCallback = !Object.hasOwn(server, "ALPNCallback") || server.ALPNCallback !== undefined;
    return !this.#choosesByName && !hasCallback && this.#server.listenerCount("keylog") === 0;
  }

  get #choosesByName(): boolean {
    const symbol = this.#sniCallback;
    const callback = symbol && (this.#server as unknown as Record<symbol, unknown>)[symbol];
    return !symbol || callback !== undefined || this.#server._contexts?.length !== 0;
  }

  #current(): Base {
    const native = this.#native;
    const added = this.#server._contexts?.length ?? 0;
    if (this.#base?.native !== native || this.#base.added !== added) {
      this.#learned.clear();
      this.#unstable.clear();
      const leaves = this.#leaves(native);
      const identity = serverIdentity(leaves);
      this.#base = { native, added, leaves, identity, idContext: this.#idContext(), clientAuthentications: new Map() };
    }
    return this.#base;
  }

  /** The native context shows the last of several certificates. */
  #leaves(native: NativeContext): Buffer[] {
    const last = native.getCertificate();
    const leaves = new Map<string | undefined, Buffer>(); // of each type of key OpenSSL keeps one
    for (const pem of list(this.#server.cert)) {
      const { publicKey, raw } = new X509Certificate(pem);
      leaves.set(publicKey.asymmetricKeyType, raw);
    }
    if (last && ![...leaves.values()].some((leaf) => leaf.equals(last))) leaves.set(undefined, last);
    return [...leaves.values()];
  }

  #idContext(): Buffer {
    if (this.#fleetIdContext) return this.#fleetIdContext;
    const own = this.#server.sessionIdContext ?? "";
    const byDefault = createHash("sha1").update(process.argv.join(" ")).digest("hex").slice(0, 32);
    return own === "" || own === byDefault ? DEFAULT_ID_CONTEXT : Buffer.from(own);
  }

  #clientAuthentication({ clientAuthentications }: Base): Buffer {
    const { requestCert, rejectUnauthorized, ca, crl, pfx } = this.#server;
    if (!requestCert) return NO_CLIENT_AUTHENTICATION;
    let known = clientAuthentications.get(rejectUnauthorized);
    if (!known) {
      const stores = list(pfx).map((each) => (typeof each === "object" && "buf" in each ? each.buf : each));
      known = clientAuthentication({ rejectUnauthorized, ca: ca ? list(ca) : defaultRoots(), crl: list(crl), pfx: stores });
      clientAuthentications.set(rejectUnauthorized, known);
    }
    return known;
  }

  #complain(why: string): void {
    if (this.#complained) return;
    this.#complained = true;
    this.#logger.warn(`resumed: sessions of this server for clients that ask for a name are not shared: ${why}`);
  }
}

/** The authorities of servers that set none. */
function defaultRoots(): (string | Uint8Array)[] {
  const { getCACertificates } = tls as unknown as { getCACertificates?: (type: "default") => string[] };
  if (getCACertificates) return getCACertificates("default");
  const extra = process.env.NODE_EXTRA_CA_CERTS;
  return [...tls.rootCertificates, ...(extra ? [readFileSync(extra)] : [])];
}

function list<Value>(values: Value | Value[] | undefined): Value[] {
  if (values === undefined) return [];
  return Array.isArray(values) ? values : [values];
}
