/**
 * The formats that the server stores, the same in every language (protos/README.md, protos/vectors):
 *
 * - store key = SHA-256("resumed/v1" 00 format 00 namespace 00 session id)
 * - sealed value = 02 | key id (4) | not_after (8, Unix seconds, big endian) | nonce (12) | AES-256-GCM(envelope), under the
 *   key HKDF-SHA256(fleet key, salt = store key, info = "resumed/v1 seal"), with the first 13 bytes and the store key as
 *   associated data
 * - sealed id = nonce (12) | AES-SIV(issue time: Unix seconds, 4, big endian), RFC 5297, under the 64-byte key
 *   HKDF-SHA256(fleet key, salt = "", info = "resumed/v1 id"), with the one associated string namespace 00 nonce
 */
import { createCipheriv, createDecipheriv, createHash, createHmac, hkdfSync } from "node:crypto";

import { AesSiv } from "./siv.js";

export const KEY_BYTES = 32;
export const ID_BYTES = 32;
export const NONCE_BYTES = 12;
export const HEADER_BYTES = 13; // version, key id, not_after
export const SEALED_VERSION = 2;
export const KEY_ID_END = 5;
const TAG_BYTES = 16;
export const LEAST_SEALED_BYTES = HEADER_BYTES + NONCE_BYTES + TAG_BYTES;

/** HKDF's info, and the number of its first block. */
const SEAL_INFO = Buffer.from("resumed/v1 seal\x01", "latin1");

/** The serialization of this stack: OpenSSL's i2d_SSL_SESSION. */
export const FORMAT = "openssl";

export function storeKey(format: string, namespace: string, id: Buffer): Buffer {
  return createHash("sha256").update(`resumed/v1\0${format}\0${namespace}\0`).update(id).digest();
}

/** One line of a keyring. Its secrets are private fields, which nothing that prints an object shows. */
export class FleetKey {
  /** The first 4 bytes of SHA-256(key): safe to show. */
  readonly id: Buffer;
  readonly #secret: Buffer;
  readonly #ids: AesSiv;

  constructor(secret: Buffer) {
    this.#secret = secret;
    this.id = createHash("sha256")
      .update(secret)
      .digest()
      .subarray(0, KEY_ID_END - 1);
    this.#ids = new AesSiv(derive(secret, Buffer.alloc(0), "resumed/v1 id", 64));
  }

  seal(key: Buffer, plaintext: Buffer, notAfter: number, nonce: Buffer): Buffer {
    const header = Buffer.alloc(HEADER_BYTES);
    header[0] = SEALED_VERSION;
    this.id.copy(header, 1);
    header.writeBigUInt64BE(BigInt(notAfter), KEY_ID_END);
    const cipher = createCipheriv("aes-256-gcm", this.#sessionKey(key), nonce);
    cipher.setAAD(Buffer.concat([header, key]));
    return Buffer.concat([header, nonce, cipher.update(plaintext), cipher.final(), cipher.getAuthTag()]);
  }

  /** Returns the plaintext of at least LEAST_SEALED_BYTES, or undefined if they are not authentic. */
  open(key: Buffer, sealed: Buffer): Buffer | undefined {
    const nonce = sealed.subarray(HEADER_BYTES, HEADER_BYTES + NONCE_BYTES);
    const decipher = createDecipheriv("aes-256-gcm", this.#sessionKey(key), nonce, { authTagLength: TAG_BYTES });
    decipher.setAAD(Buffer.concat([sealed.subarray(0, HEADER_BYTES), key]));
    decipher.setAuthTag(sealed.subarray(-TAG_BYTES));
    const plaintext = decipher.update(sealed.subarray(HEADER_BYTES + NONCE_BYTES, -TAG_BYTES));
    try {
      decipher.final();
    } catch {
      return undefined;
    }
    return plaintext;
  }

  /** Node cannot choose session ids: only the vectors and tests issue some. */
  issueId(namespace: string, issued: number, nonce: Buffer): Buffer {
    const plaintext = Buffer.alloc(4);
    plaintext.writeUInt32BE(issued);
    return Buffer.concat([nonce, this.#ids.encrypt(plaintext, associated(namespace, nonce))]);
  }

  /** Returns when the fleet issued an id of ID_BYTES, in Unix seconds, or undefined if it did not. */
  openId(namespace: string, id: Buffer): number | undefined {
    const nonce = id.subarray(0, NONCE_BYTES);
    return this.#ids.decrypt(id.subarray(NONCE_BYTES), associated(namespace, nonce))?.readUInt32BE();
  }

  /** Returns the part of a ticket key's name that shows that the fleet has named it (4 bytes). */
  macOfTicketName(namespace: string, head: Buffer): Buffer {
    const key = derive(this.#secret, Buffer.alloc(0), "resumed/v1 ticket name", 32);
    return createHmac("sha256", key).update(`${namespace}\0`).update(head).digest().subarray(0, 4);
  }

  /** A key of its own for every session: the nonce limit of GCM never binds. */
  #sessionKey(key: Buffer): Buffer {
    return deriveBlock(this.#secret, key, SEAL_INFO);
  }
}

function associated(namespace: string, nonce: Buffer): Buffer {
  return Buffer.concat([Buffer.from(`${namespace}\0`), nonce]);
}

function derive(secret: Buffer, salt: Buffer, info: string, length: number): Buffer {
  return Buffer.from(hkdfSync("sha256", secret, salt, info, length));
}

/** HKDF (RFC 5869) for one block of output by two HMACs, which take less than half the time of hkdfSync(). */
function deriveBlock(secret: Buffer, salt: Buffer, info: Buffer): Buffer {
  const extracted = createHmac("sha256", salt).update(secret).digest();
  return createHmac("sha256", extracted).update(info).digest();
}
