/** Parses ClientHellos: any bytes at all, as they come from the peer. */

/** Bytes of a connection that are looked into: several times what clients send, and too few to keep a process busy. */
const MAX_BYTES = 16_384;
const RECORD_HEADER = 5;
const MESSAGE_HEADER = 4;
const HANDSHAKE = 22;
const CLIENT_HELLO = 1;
const TLS13 = 0x0304;
// RFC 8446 section 4.2
const SERVER_NAME = 0;
const PRE_SHARED_KEY = 41;
const SUPPORTED_VERSIONS = 43;
const KEY_SHARE = 51;

export interface Hello {
  /** The legacy_session_id: in TLS 1.2 the session that is offered, in TLS 1.3 a random one (RFC 8446 appendix D.4). */
  sessionId: Buffer;
  /** The identities of pre_shared_key: the tickets that are offered in TLS 1.3. */
  identities: Buffer[];
  /** The numbers of cipher suites, in the client's order. */
  ciphers: number[];
  offersTls13: boolean;
  /** The groups for which it brings a key (RFC 8446 section 4.2.8): with any other one the key exchange is tried again. */
  keyShares: number[];
  /** The host name that the client asks for, in lower case; empty if it asks for none. */
  serverName: string;
}

/** Returns the ClientHello at the start of `bytes`, "incomplete" if it is longer, or undefined if there is none. */
export function readHello(bytes: Buffer): Hello | "incomplete" | undefined {
  const parts: Buffer[] = [];
  let at = 0;
  while (bytes[at] === HANDSHAKE && at + RECORD_HEADER <= bytes.length) {
    const length = bytes.readUInt16BE(at + 3);
    if (length === 0) return undefined; // RFC 8446 section 5.1
    parts.push(bytes.subarray(at + RECORD_HEADER, at + RECORD_HEADER + length));
    at += RECORD_HEADER + length;
  }
  const message = Buffer.concat(parts); // a ClientHello may come in several records
  if (message.length > 0 && message[0] !== CLIENT_HELLO) return undefined;
  const size = message.length < MESSAGE_HEADER ? Infinity : MESSAGE_HEADER + message.readUIntBE(1, 3);
  if (message.length >= size) return parse(message.subarray(MESSAGE_HEADER, size));
  const goesOn = bytes[at] === HANDSHAKE || at >= bytes.length;
  return goesOn && bytes.length < MAX_BYTES ? "incomplete" : undefined;
}

function parse(body: Buffer): Hello | undefined {
  try {
    const reader = new Reader(body);
    reader.take(2 + 32); // legacy_version, random
    const sessionId = reader.vector(1);
    const ciphers = numbers(new Reader(reader.vector(2)));
    reader.vector(1); // legacy_compression_methods
    const hello: Hello = { sessionId, identities: [], ciphers, offersTls13: false, keyShares: [], serverName: "" };
    const extensions = new Reader(reader.done ? Buffer.alloc(0) : reader.vector(2));
    while (!extensions.done) {
      const kind = extensions.number(2);
      const content = new Reader(extensions.vector(2));
      if (kind === SERVER_NAME) hello.serverName = serverName(content);
      else if (kind === SUPPORTED_VERSIONS) hello.offersTls13 = offersTls13(content);
      else if (kind === KEY_SHARE) hello.keyShares = keyShares(content);
      else if (kind === PRE_SHARED_KEY) hello.identities = identities(content);
    }
    return hello;
  } catch (error) {
    if (error instanceof RangeError) return undefined;
    throw error;
  }
}

/** RFC 6066 section 3: a list of one host name. */
function serverName(extension: Reader): string {
  const list = new Reader(extension.vector(2));
  const kind = list.number(1);
  const name = list.vector(2);
  return kind === 0 && list.done ? name.toString("latin1").toLowerCase() : "";
}

function offersTls13(extension: Reader): boolean {
  const versions = new Reader(extension.vector(1));
  let offered = false;
  while (!versions.done) offered = versions.number(2) === TLS13 || offered;
  return offered;
}

function numbers(list: Reader): number[] {
  const all: number[] = [];
  while (!list.done) all.push(list.number(2));
  return all;
}

function keyShares(extension: Reader): number[] {
  const list = new Reader(extension.vector(2));
  const groups: number[] = [];
  while (!list.done) {
    groups.push(list.number(2));
    list.vector(2);
  }
  return groups;
}

/** RFC 8446 section 4.2.11: each identity is followed by its obfuscated age. */
function identities(extension: Reader): Buffer[] {
  const list = new Reader(extension.vector(2));
  const found: Buffer[] = [];
  while (!list.done) {
    found.push(list.vector(2));
    list.take(4);
  }
  return found;
}

/** Reads numbers and vectors of TLS (RFC 8446 section 3.4); throws RangeError at the end. */
class Reader {
  readonly #bytes: Buffer;
  #at = 0;

  constructor(bytes: Buffer) {
    this.#bytes = bytes;
  }

  get done(): boolean {
    return this.#at === this.#bytes.length;
  }

  take(length: number): Buffer {
    const start = this.#skip(length);
    return this.#bytes.subarray(start, this.#at);
  }

  number(size: number): number {
    return this.#bytes.readUIntBE(this.#skip(size), size);
  }

  vector(size: number): Buffer {
    return this.take(this.number(size));
  }

  /** Goes on by `length` bytes, and returns where they begin. */
  #skip(length: number): number {
    const start = this.#at;
    if (length > this.#bytes.length - start) throw new RangeError("cut short");
    this.#at += length;
    return start;
  }
}
