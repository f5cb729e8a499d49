/** The fleet's keys. */
import { closeSync, fstatSync, openSync, readFileSync, type Stats as FileStats } from "node:fs";
import { inspect } from "node:util";

import { ResumedError, type Unsealable } from "./errors.js";
import { codeOf, Files, type Logger, type Reload } from "./files.js";
import { isOwn, newNonce } from "./issuer.js";
import {
  FleetKey,
  HEADER_BYTES,
  ID_BYTES,
  KEY_BYTES,
  KEY_ID_END,
  LEAST_SEALED_BYTES,
  NONCE_BYTES,
  SEALED_VERSION,
} from "./sealing.js";

/** A sealed value that opened. */
export interface Opened {
  /** The session, in its envelope. */
  plaintext: Buffer;
  /** The end of its life in Unix seconds. */
  notAfter: number;
  /** Whether another process sealed it. */
  foreign: boolean;
}

/** The fleet's keys: the first one seals, every one opens. Printed, it shows the ids of its keys, never the keys. */
export class Keyring {
  #keys: readonly FleetKey[];
  #files: Files | undefined;

  private constructor(keys: readonly FleetKey[]) {
    this.#keys = keys;
  }

  /**
   * Reads a keyring file, as `resumed keygen` makes them: one key a line (base64 of 32 bytes), the first one seals, # begins
   * a comment. The file must not be readable by others than its owner and group, and owned by this user or root.
   *
   * It is read again when it has changed and settled for a second, so that keys can be rotated while serving. A changed file that
   * cannot be used is reported to `logger`, and the keys read before stay.
   *
   * @throws {ResumedError} The file is missing, readable by others, another user's, or malformed.
   */
  static load(path: string, logger: Logger = console): Keyring {
    let files: Files;
    try {
      files = new Files("keyring", [path], logger);
    } catch (error) {
      throw new ResumedError(`${(error as Error).message}; make one with \`resumed keygen ${path}\``);
    }
    const keyring = new Keyring(readKeys(path));
    keyring.#files = files;
    return keyring;
  }

  /**
   * Makes a keyring of raw keys of 32 bytes, for those who keep their secrets elsewhere than in files.
   *
   * @throws {ResumedError} There is no key, or one does not have 32 bytes.
   */
  static fromKeys(...keys: readonly Uint8Array[]): Keyring {
    if (keys.length === 0 || keys.some((key) => key.length !== KEY_BYTES)) {
      throw new ResumedError(`a keyring needs at least one key, each of ${KEY_BYTES} bytes`);
    }
    return new Keyring(keys.map((key) => new FleetKey(Buffer.from(key))));
  }

  toString(): string {
    return `Keyring(${idsOf(this.#current())})`;
  }

  [inspect.custom](): string {
    return this.toString();
  }

  /**
   * The keys in the order of the file.
   *
   * @internal
   */
  get fleetKeys(): readonly FleetKey[] {
    return this.#current();
  }

  /**
   * The state of the file, which is checked if it is time; undefined if the keys are not from a file.
   *
   * @internal
   */
  get lastReload(): Reload | undefined {
    this.#current();
    return this.#files?.lastReload;
  }

  /** @internal */
  seal(key: Buffer, plaintext: Buffer, notAfter: number): Buffer {
    return this.#first().seal(key, plaintext, notAfter, newNonce());
  }

  /**
   * Opens the value that the server returned for a store key, any bytes at all.
   *
   * @internal
   */
  open(key: Buffer, sealed: Buffer, now: number): Opened | Unsealable {
    if (sealed.length < LEAST_SEALED_BYTES || sealed[0] !== SEALED_VERSION) return "malformed";
    const fleetKey = this.#current().find((each) => each.id.equals(sealed.subarray(1, KEY_ID_END)));
    if (!fleetKey) return "unknown-key";
    const plaintext = fleetKey.open(key, sealed);
    if (!plaintext) return "not-authentic";
    const notAfter = Number(sealed.subarray(0, HEADER_BYTES).readBigUInt64BE(KEY_ID_END));
    const nonce = sealed.subarray(HEADER_BYTES, HEADER_BYTES + NONCE_BYTES);
    return now < notAfter ? { plaintext, notAfter, foreign: !isOwn(nonce) } : "expired";
  }

  /**
   * Returns when the fleet issued an id, any bytes at all, for a namespace, in Unix seconds; undefined if it did not.
   *
   * @internal
   */
  openId(namespace: string, id: Buffer): number | undefined {
    if (id.length !== ID_BYTES) return undefined;
    for (const key of this.#current()) {
      const issued = key.openId(namespace, id);
      if (issued !== undefined) return issued;
    }
    return undefined;
  }

  #first(): FleetKey {
    const [first] = this.#current();
    if (!first) throw new Error("a keyring has at least one key");
    return first;
  }

  #current(): readonly FleetKey[] {
    const files = this.#files;
    files?.follow(() => {
      for (const path of files.paths) this.#keys = readKeys(path);
      return idsOf(this.#keys);
    });
    return this.#keys;
  }
}

function idsOf(keys: readonly FleetKey[]): string {
  return keys.map((key) => key.id.toString("hex")).join(", ");
}

function readKeys(path: string): FleetKey[] {
  let text: string;
  let status: FileStats;
  try {
    const file = openSync(path, "r");
    try {
      status = fstatSync(file);
      text = readFileSync(file, "latin1");
    } finally {
      closeSync(file);
    }
  } catch (error) {
    throw new ResumedError(`keyring ${path}: ${codeOf(error)}`);
  }
  const mode = status.mode & 0o777;
  if (mode & 0o027 && process.platform !== "win32") {
    const shown = mode.toString(8).padStart(4, "0");
    const remedy = `run \`chmod 600 ${path}\`, or give a Kubernetes Secret \`defaultMode: 0400\` (0440 with an fsGroup)`;
    throw new ResumedError(`keyring ${path}: others may read or change it (mode ${shown}); ${remedy}`);
  }
  const user = process.geteuid?.() ?? 0;
  if (status.uid !== user && status.uid !== 0 && user !== 0) {
    throw new ResumedError(`keyring ${path}: another user owns it, who may change it; run \`chown ${user} ${path}\``);
  }
  const keys: FleetKey[] = [];
  for (const [index, line] of text.split("\n").entries()) {
    const encoded = line.replace(/#.*/, "").trim();
    if (!encoded) continue;
    const secret = Buffer.from(encoded, "base64");
    // The line itself is not shown: it may be a key with one wrong character.
    if (secret.length !== KEY_BYTES || secret.toString("base64") !== encoded) {
      throw new ResumedError(`keyring ${path}, line ${index + 1}: not a key (base64 of ${KEY_BYTES} bytes)`);
    }
    keys.push(new FleetKey(secret));
  }
  if (keys.length === 0) throw new ResumedError(`keyring ${path}: holds no key; make one with \`resumed keygen\``);
  return keys;
}
