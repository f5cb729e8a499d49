/**
 * The plaintext of sealed values, the same in every language (protos/README.md, protos/vectors):
 * context fingerprint (32) | issue time (8, microseconds after the Unix epoch, big endian) | session.
 */

export const FINGERPRINT_BYTES = 32;
const HEADER_BYTES = FINGERPRINT_BYTES + 8;

export interface Envelope {
  fingerprint: Buffer;
  /** When the full handshake was, in Unix seconds. */
  issued: number;
  session: Buffer;
}

export function wrap({ fingerprint, issued, session }: Envelope): Buffer {
  return Buffer.concat([fingerprint, microseconds(issued), session]);
}

/** Decodes an envelope; returns undefined for one that is too short. */
export function unwrap(envelope: Buffer): Envelope | undefined {
  if (envelope.length < HEADER_BYTES) return undefined;
  return {
    fingerprint: envelope.subarray(0, FINGERPRINT_BYTES),
    issued: seconds(envelope.subarray(FINGERPRINT_BYTES)),
    session: envelope.subarray(HEADER_BYTES),
  };
}

/** Encodes Unix seconds as microseconds in 8 bytes. */
export function microseconds(time: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(Math.round(time * 1e6)));
  return bytes;
}

/** Reads Unix seconds of the microseconds in the first 8 bytes. */
export function seconds(bytes: Buffer): number {
  return Number(bytes.readBigUInt64BE()) / 1e6;
}
