/**
 * Knows the sealed values again that this process made, and so the sessions that another one negotiated. It needs no memory of
 * them: four of the twelve bytes of a nonce are a keyed function of the other eight. To those who do not have its key, the fleet
 * key's holders among them, a nonce is as random as any. Nothing is trusted because of it.
 */
import { createCipheriv, randomBytes, randomFillSync } from "node:crypto";

const RANDOM_BYTES = 8;
const MARK_BYTES = 4;
const BLOCK_BYTES = 16;
/** A block cipher under a key of this process alone: each block is enciphered by itself, so that one object serves for all. */
const cipher = createCipheriv("aes-256-ecb", randomBytes(32), null).setAutoPadding(false);
const block = Buffer.alloc(BLOCK_BYTES);
const pool = Buffer.alloc(4096);
let used = pool.length;

export function newNonce(): Buffer {
  if (used === pool.length) {
    randomFillSync(pool);
    used = 0;
  }
  const random = pool.subarray(used, (used += RANDOM_BYTES));
  return Buffer.concat([random, markOf(random)]);
}

/** Whether newNonce() of this process made a nonce; one of others in four thousand million is taken for such. */
export function isOwn(nonce: Buffer): boolean {
  return nonce.subarray(RANDOM_BYTES).equals(markOf(nonce.subarray(0, RANDOM_BYTES)));
}

function markOf(random: Buffer): Buffer {
  random.copy(block);
  return cipher.update(block).subarray(0, MARK_BYTES);
}
