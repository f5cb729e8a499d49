/**
 * A session as OpenSSL serializes it (i2d_SSL_SESSION): an ASN.1 sequence of which a few fields are read and written, and the
 * others kept as they are. The fields are those of ssl/ssl_asn1.c in OpenSSL; all from `time` on are optional and tagged.
 */

import { element, elementsOf, encode, INTEGER, OCTET_STRING, SEQUENCE, type Element } from "./der.js";
import { FINGERPRINT_BYTES, microseconds, seconds } from "./envelope.js";

const CIPHER = 2; // after two versions
const SESSION_ID = 3;
const TIME = 0xa1;
const TIMEOUT = 0xa2;
const PEER = 0xa3;
const ID_CONTEXT = 0xa4;
const VERIFY_RESULT = 0xa5;
const HOST_NAME = 0xa6;
const TICKET_DATA = 0xb2;

/**
 * The data that all sessions of a lineage share: sessions of resumed connections belong to the lineage of the one that they resumed. OpenSSL copies a session's ticket application data
 * into them, where all frontends with OpenSSL keep it: the mark | fingerprint (32) | issue time (8, microseconds) | end (8, Unix
 * seconds) | ids of the connection's sessions (Node: none).
 */
export interface Lineage {
  fingerprint: Buffer;
  /** When the full handshake was, in Unix seconds. */
  issued: number;
  /** When all of them end, in Unix seconds. */
  end: number;
}

const MARK = Buffer.from("resumed\x02", "latin1");
const ISSUED = MARK.length + FINGERPRINT_BYTES;
const LINEAGE_BYTES = ISSUED + 16;

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

  /** The number of its cipher suite. */
  get cipher(): number {
    const content = this.#elements[CIPHER]?.content;
    return content?.length === 2 ? content.readUInt16BE() : 0;
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

  get idContext(): Buffer {
    return this.#inner(ID_CONTEXT) ?? Buffer.alloc(0);
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

  /** The certificate of its client (DER), if it has one. */
  get peer(): Buffer | undefined {
    const content = this.#inner(PEER);
    return content && element(SEQUENCE, content);
  }

  /** Whether nothing failed when the certificate of its client was verified. */
  get verified(): boolean {
    return this.#inner(VERIFY_RESULT)?.every((byte) => byte === 0) ?? true;
  }

  /** Whether its ticket application data are the application's, which must not get lost. */
  get hasForeignData(): boolean {
    const data = this.#inner(TICKET_DATA);
    return data !== undefined && !isLineage(data);
  }

  /** The data of this package in its ticket application data. */
  get lineage(): Lineage | undefined {
    const data = this.#inner(TICKET_DATA);
    if (!data || !isLineage(data)) return undefined;
    const end = Number(data.readBigUInt64BE(ISSUED + 8));
    return { fingerprint: data.subarray(MARK.length, ISSUED), issued: seconds(data.subarray(ISSUED)), end };
  }

  set lineage(lineage: Lineage | undefined) {
    if (!lineage) {
      this.#set(TICKET_DATA, undefined);
      return;
    }
    const end = Buffer.alloc(8);
    end.writeBigUInt64BE(BigInt(lineage.end));
    const data = Buffer.concat([MARK, lineage.fingerprint, microseconds(lineage.issued), end]);
    this.#set(TICKET_DATA, element(OCTET_STRING, data));
  }

  serialize(): Buffer {
    return element(SEQUENCE, encode(this.#elements));
  }

  /** The content of the element in a tagged field. */
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

function isLineage(data: Buffer): boolean {
  return data.length >= LINEAGE_BYTES && data.subarray(0, MARK.length).equals(MARK);
}

/** The content of a DER integer that is not negative. */
function integer(value: number): Buffer {
  let hex = value.toString(16);
  hex = hex.padStart(hex.length + (hex.length % 2), "0");
  return Buffer.from(parseInt(hex.slice(0, 2), 16) >= 0x80 ? `00${hex}` : hex, "hex");
}
