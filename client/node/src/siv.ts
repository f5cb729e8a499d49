/**
 * AES-SIV (RFC 5297) with a 64-byte key and one associated string.
 *
 * Node's OpenSSL has it, but node:crypto does not let it through, and no maintained package serves both ESM and CommonJS. The
 * block cipher is OpenSSL's: CMAC (RFC 4493) is the last block of CBC.
 */
import { createCipheriv, timingSafeEqual } from "node:crypto";

const BLOCK = 16;
const ZERO = Buffer.alloc(BLOCK);

export class AesSiv {
  readonly #macKey: Buffer;
  readonly #encryptionKey: Buffer;
  readonly #subkeys: readonly [Buffer, Buffer];
  readonly #start: Buffer;

  constructor(key: Buffer) {
    this.#macKey = key.subarray(0, key.length / 2);
    this.#encryptionKey = key.subarray(key.length / 2);
    const first = double(this.#cbc(ZERO));
    this.#subkeys = [first, double(first)];
    this.#start = double(this.#cmac(ZERO));
  }

  /** Returns tag and ciphertext. */
  encrypt(plaintext: Buffer, associated: Buffer): Buffer {
    const tag = this.#s2v(plaintext, associated);
    return Buffer.concat([tag, this.#ctr(tag, plaintext)]);
  }

  /** Returns the plaintext of tag and ciphertext, or undefined if they are not authentic. */
  decrypt(sealed: Buffer, associated: Buffer): Buffer | undefined {
    const tag = sealed.subarray(0, BLOCK);
    const plaintext = this.#ctr(tag, sealed.subarray(BLOCK));
    return timingSafeEqual(tag, this.#s2v(plaintext, associated)) ? plaintext : undefined;
  }

  /** RFC 5297 section 2.4. */
  #s2v(plaintext: Buffer, associated: Buffer): Buffer {
    const sum = xor(this.#start, this.#cmac(associated));
    if (plaintext.length >= BLOCK) {
      const end = plaintext.length - BLOCK;
      return this.#cmac(Buffer.concat([plaintext.subarray(0, end), xor(plaintext.subarray(end), sum)]));
    }
    return this.#cmac(xor(double(sum), padded(plaintext)));
  }

  #ctr(tag: Buffer, data: Buffer): Buffer {
    const counter = Buffer.from(tag);
    counter[8] = (counter[8] ?? 0) & 0x7f;
    counter[12] = (counter[12] ?? 0) & 0x7f;
    return createCipheriv(`aes-${this.#bits}-ctr`, this.#encryptionKey, counter).update(data);
  }

  #cmac(message: Buffer): Buffer {
    const whole = message.length > 0 && message.length % BLOCK === 0;
    const end = whole ? message.length - BLOCK : message.length - (message.length % BLOCK);
    const last = message.subarray(end);
    return this.#cbc(Buffer.concat([message.subarray(0, end), xor(whole ? last : padded(last), this.#subkeys[whole ? 0 : 1])]));
  }

  #cbc(blocks: Buffer): Buffer {
    return createCipheriv(`aes-${this.#bits}-cbc`, this.#macKey, ZERO).update(blocks).subarray(-BLOCK);
  }

  get #bits(): number {
    return this.#macKey.length * 8;
  }
}

function padded(block: Buffer): Buffer {
  const result = Buffer.alloc(BLOCK);
  block.copy(result);
  result[block.length] = 0x80;
  return result;
}

function xor(left: Buffer, right: Buffer): Buffer {
  return Buffer.from(left.map((byte, index) => byte ^ (right[index] ?? 0)));
}

/** Multiplication by x in GF(2^128), RFC 5297 section 2.3. */
function double(block: Buffer): Buffer {
  let value = BigInt(`0x${block.toString("hex")}`) << 1n;
  if (value >> 128n) value ^= (1n << 128n) | 0x87n;
  return Buffer.from(value.toString(16).padStart(BLOCK * 2, "0"), "hex");
}
