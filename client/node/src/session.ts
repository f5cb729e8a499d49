/**
 * A session as OpenSSL serializes it (i2d_SSL_SESSION): an ASN.1 sequence of which a few fields are read and written, and the
 * others kept as they are. The fields are those of ssl/ssl_asn1.c in OpenSSL; all from `time` on are optional and tagged.
 */

const SEQUENCE = 0x30;
const INTEGER = 0x02;
const OCTET_STRING = 0x04;
const SESSION_ID = 3; // after two versions and the cipher
const TIME = 0xa1;
const TIMEOUT = 0xa2;
const ID_CONTEXT = 0xa4;
const HOST_NAME = 0xa6;
const TICKET_DATA = 0xb2;

/**
 * The line of sessions that one full handshake began: when that was, and, in a session that resumes, when it ends; Unix seconds, 0 for
 * unknown. OpenSSL copies a session's ticket application data into those that the resumed connection issues, where all frontends with
 * OpenSSL keep it: two numbers of 8 bytes, microseconds and seconds.
 */
export interface Line {
  issued: number;
  end: number;
}

const LINE_BYTES = 16;

interface Element {
  tag: number;
  content: Buffer;
}

export class Session {
  readonly #elements: Element[];

  private constructor(elements: Element[]) {
    this.#elements = elements;
  }

  /** Returns the session, or undefined of any bytes that are none. */
  static parse(serialized: Buffer): Session | undefined {
    const [sequence, ...rest] = elementsOf(serialized) ?? [];
    if (sequence?.tag !== SEQUENCE || rest.length > 0) return undefined;
    const elements = elementsOf(sequence.content);
    const fixed = [INTEGER, INTEGER, OCTET_STRING, OCTET_STRING, OCTET_STRING];
    if (!elements || fixed.some((tag, index) => elements[index]?.tag !== tag)) return undefined;
    return new Session(elements);
  }

  get id(): Buffer {
    return this.#elements[SESSION_ID]?.content ?? Buffer.alloc(0);
  }

  /** The host name that it was negotiated for, in lower case; empty if the client asked for none. */
  get hostName(): string {
    return this.#inner(HOST_NAME)?.toString("latin1") ?? "";
  }

  set hostName(name: string) {
    this.#set(HOST_NAME, name ? element(OCTET_STRING, Buffer.from(name, "latin1")) : undefined);
  }

  set idContext(context: Buffer) {
    this.#set(ID_CONTEXT, element(OCTET_STRING, context));
  }

  /** When its life began, in Unix seconds. */
  set time(seconds: number) {
    this.#set(TIME, element(INTEGER, integer(seconds)));
  }

  /** How long it lives, in seconds; 0 if it does not say. */
  get timeout(): number {
    const content = this.#inner(TIMEOUT);
    return content && content.length > 0 && content.length <= 6 ? content.readIntBE(0, content.length) : 0;
  }

  set timeout(seconds: number) {
    this.#set(TIMEOUT, element(INTEGER, integer(seconds)));
  }

  /** The line that it belongs to; undefined if it does not say. */
  get line(): Line | undefined {
    const data = this.#inner(TICKET_DATA);
    if (!data || data.length < LINE_BYTES) return undefined;
    return { issued: Number(data.readBigUInt64BE(0)) / 1e6, end: Number(data.readBigUInt64BE(8)) };
  }

  set line(line: Line | undefined) {
    const data = Buffer.alloc(LINE_BYTES);
    data.writeBigUInt64BE(BigInt(Math.round((line?.issued ?? 0) * 1e6)), 0);
    data.writeBigUInt64BE(BigInt(line?.end ?? 0), 8);
    this.#set(TICKET_DATA, line && element(OCTET_STRING, data));
  }

  serialize(): Buffer {
    return element(SEQUENCE, Buffer.concat(this.#elements.map(({ tag, content }) => element(tag, content))));
  }

  /** The content of what a tagged field holds. */
  #inner(tag: number): Buffer | undefined {
    const field = this.#elements.find((each) => each.tag === tag);
    return field && elementsOf(field.content)?.[0]?.content;
  }

  #set(tag: number, content: Buffer | undefined): void {
    // Fields are in the order of their tags, behind those that have none.
    let index = this.#elements.findIndex((each) => each.tag >= tag);
    if (index < 0) index = this.#elements.length;
    const present = this.#elements[index]?.tag === tag ? 1 : 0;
    this.#elements.splice(index, present, ...(content ? [{ tag, content }] : []));
  }
}

/** Returns the DER elements that make up bytes, or undefined if they are none. Tags and lengths as OpenSSL writes them. */
function elementsOf(bytes: Buffer): Element[] | undefined {
  const elements: Element[] = [];
  for (let at = 0; at < bytes.length;) {
    const [tag, first] = [bytes[at], bytes[at + 1]];
    if (tag === undefined || first === undefined) return undefined;
    at += 2;
    let length = first;
    if (first >= 0x80) {
      const size = first - 0x80;
      if (size < 1 || size > 3 || at + size > bytes.length) return undefined;
      length = bytes.readUIntBE(at, size);
      at += size;
    }
    if (at + length > bytes.length) return undefined;
    elements.push({ tag, content: bytes.subarray(at, at + length) });
    at += length;
  }
  return elements;
}

function element(tag: number, content: Buffer): Buffer {
  const { length } = content;
  const size = length < 0x80 ? 0 : length < 0x100 ? 1 : length < 0x10000 ? 2 : 3;
  const head = Buffer.alloc(2 + size);
  head[0] = tag;
  head[1] = size ? 0x80 + size : length;
  if (size) head.writeUIntBE(length, 2, size);
  return Buffer.concat([head, content]);
}

/** The content of a DER integer that is not negative. */
function integer(value: number): Buffer {
  let hex = value.toString(16);
  hex = hex.padStart(hex.length + (hex.length % 2), "0");
  return Buffer.from(parseInt(hex.slice(0, 2), 16) >= 0x80 ? `00${hex}` : hex, "hex");
}
