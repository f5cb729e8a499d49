/**
 * Ticket secrets, of which the frontends of a fleet derive their ticket keys: one for each epoch (protos/README.md). Time is cut
 * into epochs of equal length. The secret of an epoch is agreed on through the store, where it is a sealed value at an
 * address that follows from the epoch.
 */
import { hkdfSync } from "node:crypto";
import { inspect } from "node:util";

import { storeKey, type FleetKey } from "./sealing.js";

export const SECRET_BYTES = 32;
export const MAX_ROTATION_SECONDS = 7 * 24 * 3600;
export const MAX_GENERATION = 255;
const VERSION = 1;
const ENCODED_BYTES = 1 + 8 + SECRET_BYTES;

/** An epoch, and one attempt to agree on its secret. */
export interface Epoch {
  /** Its beginning in Unix seconds: a multiple of its length. */
  start: number;
  /** Its length in seconds. */
  rotation: number;
  /** Above 0 where the secret of an earlier generation cannot be opened, or was removed. */
  generation: number;
}

/** Returns the epoch of a time in Unix seconds. */
export function epochAt(now: number, rotation: number): Epoch {
  return { start: Math.floor(now / rotation) * rotation, rotation, generation: 0 };
}

/** Returns when the secret of an epoch is erased: its tickets may live, and a late frontend use it for one more epoch. */
export function notAfterOf({ start, rotation }: Epoch, lifetime: number): number {
  return start + 2 * rotation + lifetime;
}

export function encodeEpoch({ start, rotation, generation }: Epoch): Buffer {
  const encoded = Buffer.alloc(8);
  encoded.writeUInt32BE(start);
  encoded.writeUIntBE(rotation, 4, 3);
  encoded.writeUInt8(generation, 7);
  return encoded;
}

/** Returns the store key of the secret of an epoch that a fleet key seals. */
export function addressOf(namespace: string, fleetKey: FleetKey, epoch: Epoch): Buffer {
  return storeKey("ticket-secret", namespace, Buffer.concat([fleetKey.id, encodeEpoch(epoch)]));
}

/** The secret of an epoch. Printed, it shows the name of its keys, which each ticket shows as well. */
export class TicketSecret {
  readonly namespace: string;
  readonly fleetKey: FleetKey;
  readonly epoch: Epoch;
  /** When a frontend proposed it, in Unix seconds. */
  readonly created: number;
  /** When it is erased, in Unix seconds. */
  readonly notAfter: number;
  readonly #secret: Buffer;

  constructor(namespace: string, fleetKey: FleetKey, epoch: Epoch, secret: Buffer, created: number, notAfter: number) {
    this.namespace = namespace;
    this.fleetKey = fleetKey;
    this.epoch = epoch;
    this.#secret = secret;
    this.created = created;
    this.notAfter = notAfter;
  }

  /** Returns the secret with a plaintext, or undefined for a malformed one. */
  static decode(
    namespace: string,
    fleetKey: FleetKey,
    epoch: Epoch,
    encoded: Buffer,
    notAfter: number,
  ): TicketSecret | undefined {
    if (encoded.length !== ENCODED_BYTES || encoded[0] !== VERSION) return undefined;
    const created = Number(encoded.readBigUInt64BE(1)) / 1e6;
    return new TicketSecret(namespace, fleetKey, epoch, Buffer.from(encoded.subarray(9)), created, notAfter);
  }

  /** Returns the plaintext of its sealed value. */
  encode(): Buffer {
    const head = Buffer.alloc(9);
    head[0] = VERSION;
    head.writeBigUInt64BE(BigInt(Math.floor(this.created * 1e6)), 1);
    return Buffer.concat([head, this.#secret]);
  }

  /** The store key of its sealed value. */
  get address(): Buffer {
    return addressOf(this.namespace, this.fleetKey, this.epoch);
  }

  /** The name of its keys, with which each of its tickets begins: epoch (8), tag (4), MAC of the fleet (4). */
  get name(): Buffer {
    const head = Buffer.concat([encodeEpoch(this.epoch), this.#derive("tag", 4)]);
    return Buffer.concat([head, this.fleetKey.macOfTicketName(this.namespace, head)]);
  }

  /** The keys that Node takes: name (16), HMAC-SHA256 (16), AES-128-CBC (16). */
  get raw48(): Buffer {
    return Buffer.concat([this.name, this.#derive("raw48", 32)]);
  }

  /** Overwrites the secret. */
  erase(): void {
    this.#secret.fill(0);
  }

  toString(): string {
    return `TicketSecret(${this.name.toString("hex")})`;
  }

  [inspect.custom](): string {
    return this.toString();
  }

  #derive(form: string, length: number): Buffer {
    return Buffer.from(hkdfSync("sha256", this.#secret, "", `resumed/v1 ticket key\0${form}`, length));
  }
}
