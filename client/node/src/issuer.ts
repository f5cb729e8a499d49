/**
 * Knows the sealed values again that this process made, and so the sessions that another one negotiated. It needs no memory of
 * them: four of the twelve bytes of a nonce are a keyed hash of the other eight. To those who do not have its key, the fleet
 * key's holders among them, a nonce is as random as any. Nothing is trusted because of it.
 */
import { createHmac, randomBytes } from "node:crypto";

const RANDOM_BYTES = 8;
const MARK_BYTES = 4;
const KEY = randomBytes(32);

export function newNonce(): Buffer {
  const random = randomBytes(RANDOM_BYTES);
  return Buffer.concat([random, markOf(random)]);
}

/** Whether newNonce() of this process made a nonce; one of others in four thousand million is taken for such. */
export function isOwn(nonce: Buffer): boolean {
  return nonce.subarray(RANDOM_BYTES).equals(markOf(nonce.subarray(0, RANDOM_BYTES)));
}

function markOf(random: Buffer): Buffer {
  return createHmac("sha256", KEY).update(random).digest().subarray(0, MARK_BYTES);
}
