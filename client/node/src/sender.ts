/** Sends Puts and Removes while no handshake waits: a bounded queue, many operations in one Batch, one Batch at a time. */
import type { Recorder } from "./stats.js";
import { CallError, duration, type Store } from "./store.js";
import type { BatchOperation } from "./v1/resumed/v1/session_store.js";

export const BATCH_OPERATIONS = 256;
export const BATCH_DEADLINE_MS = 1000;
export const QUEUE_BYTES = 16 << 20;
/** How many removals a process remembers: about 2 MB. */
const MOST_REMOVED = 16_384;
/** The memory of an entry beside its value, roughly. */
export const ENTRY_BYTES = 256;
/**
 * The operations of a Batch that show load, since a handshake alone has one or two: a Batch of any size costs about as much as a
 * resumption, so the next one gathers more, unless a handshake waits for it.
 */
export const BUSY_OPERATIONS = 3;
/** Milliseconds after such a Batch before the next one. */
export const BUSY_PAUSE_MS = 5;
/** Milliseconds before a Batch that failed is sent again; doubles with each failure in a row. */
export const RETRY_MS = { first: 50, max: 800 };
/** Batches in a row that fail before close() gives up the rest of the queue, and the process may exit. */
const PATIENCE = 3;

/** A Put, or a Remove where `value` is undefined. */
export interface Outgoing {
  key: Buffer;
  value?: Buffer;
  /** When the session's life ends, in Unix seconds: waiting in the queue does not prolong it. */
  notAfter?: number;
  /** When it was negotiated, in Unix seconds: waiting in the queue does not bring it past a purge. */
  issued?: number;
  /** For a Remove, why. */
  reason?: "application" | "fatal-error";
}

interface Entry extends Outgoing {
  /** Whether a handshake waits for it. */
  urgent: boolean;
  finished: () => void;
}

export class Sender {
  readonly #store: Store;
  readonly #limited: (began: number) => void;
  readonly #recorder: Recorder;
  readonly #clock: () => number;
  #queue: Entry[] = [];
  /** The keys of the Removes in the queue. */
  readonly #removing = new Set<string>();
  /** The last removals that left the queue, with any outcome. */
  readonly #removed = new Set<string>();
  /** Of those, at most MOST_REMOVED that were refused or dropped. */
  readonly #failed = new Set<string>();
  #bytes = 0;
  #sending = false;
  #failures = 0;
  /** Whether the last Batch showed load, for a pause after its end. */
  #busy = false;
  #closed = false;
  #timer: NodeJS.Timeout | undefined;

  /** `limited` is called when the server has refused a Batch because of a limit, with its begin (performance.now()). */
  constructor(parts: { store: Store; limited: (began: number) => void; recorder: Recorder; clock: () => number }) {
    this.#store = parts.store;
    this.#limited = parts.limited;
    this.#recorder = parts.recorder;
    this.#clock = parts.clock;
  }

  /** Whether the server carried out the last Batch, if there was any. */
  get answered(): boolean {
    return this.#failures === 0;
  }

  /** Queues `outgoing`, or drops it if there is no room; resolves when it was sent or given up. Never rejects. */
  submit(outgoing: Outgoing, urgent: boolean): Promise<void> {
    return new Promise((finished) => {
      if (this.#closed || this.#bytes + size(outgoing) > QUEUE_BYTES) {
        this.#conclude(outgoing, "dropped");
        finished();
        return;
      }
      this.#queue.push({ ...outgoing, urgent, finished });
      if (!outgoing.value) this.#removing.add(nameOf(outgoing.key));
      this.#bytes += size(outgoing);
      const due = urgent || !this.#busy || this.#queue.length >= BATCH_OPERATIONS;
      this.#schedule(due ? 0 : BUSY_PAUSE_MS);
    });
  }

  /** Whether this process has removed a session, whether the store knows of it or not. */
  isRemoved(key: Buffer): boolean {
    const name = nameOf(key);
    return this.#removing.has(name) || this.#removed.has(name);
  }

  /** Sends what was submitted so far: see {@link Installation.flush}. */
  async flush(timeout: number): Promise<boolean> {
    return (await this.#sent(timeout)) && this.#failed.size === 0;
  }

  /** Resolves when all that was submitted so far was sent, to true, or when `timeout` milliseconds have passed, to false. */
  async #sent(timeout: number): Promise<boolean> {
    const last = this.#queue.at(-1);
    if (!last) return true;
    this.#schedule(0);
    const sent = new Promise<true>((resolve) => {
      const { finished } = last;
      last.finished = () => {
        finished();
        resolve(true);
      };
    });
    return within(sent, timeout, false);
  }

  /** Accepts nothing more, sends the rest of the queue, for up to `timeout` milliseconds, and stops. */
  async close(timeout: number): Promise<void> {
    if (this.#closed) return;
    if (this.#failures < PATIENCE) await this.#sent(timeout);
    this.#closed = true;
    clearTimeout(this.#timer);
    for (const entry of this.#queue) {
      this.#conclude(entry, "dropped");
      entry.finished();
    }
    this.#queue = [];
  }

  /** Calls #run after `delay` milliseconds, or at the end of this turn of the event loop. */
  #schedule(delay: number): void {
    if (this.#sending || this.#closed) return; // #run schedules the next Batch
    if (this.#failures > 0) {
      this.#timer ??= this.#later(Math.min(RETRY_MS.first * 2 ** (this.#failures - 1), RETRY_MS.max));
      if (this.#failures >= PATIENCE) this.#timer.unref();
    } else if (delay === 0) {
      clearTimeout(this.#timer);
      this.#timer = undefined;
      this.#sending = true;
      setImmediate(() => void this.#run());
    } else {
      this.#timer ??= this.#later(delay);
    }
  }

  #later(delay: number): NodeJS.Timeout {
    return setTimeout(() => {
      this.#timer = undefined;
      this.#busy = false;
      if (this.#queue.length === 0) return;
      this.#sending = true;
      void this.#run();
    }, delay);
  }

  async #run(): Promise<void> {
    const sent = await this.#send();
    this.#failures = sent ? 0 : this.#failures + 1;
    this.#sending = false;
    if (this.#busy && !this.#isDue()) this.#schedule(BUSY_PAUSE_MS);
    else if (this.#queue.length > 0) this.#schedule(0);
  }

  /** Whether the head of the queue does not wait for more: a Batch is full, or a handshake waits for it. */
  #isDue(): boolean {
    return this.#queue.length >= BATCH_OPERATIONS || this.#queue.some(({ urgent }) => urgent);
  }

  /** Sends the head of the queue, and resolves to whether the server carried that out. */
  async #send(): Promise<boolean> {
    const batch = this.#queue.slice(0, BATCH_OPERATIONS);
    const began = performance.now();
    const now = this.#clock();
    const operations = batch.map((outgoing) => this.#operation(outgoing, now));
    const living = operations.filter((operation) => operation !== undefined);
    try {
      const results = living.length > 0 ? await this.#store.batch(living, BATCH_DEADLINE_MS) : [];
      if (results.length !== living.length) throw new Error("the number of results differs from the number of operations");
      for (const [index, entry] of batch.entries()) {
        const result = operations[index] && results.shift()?.result;
        this.#conclude(entry, !result ? "expired" : result.$case === "error" ? "refused" : "stored");
      }
    } catch (error) {
      // All entries stay in the queue, in their order: ids are write-once, so a second Put does no harm.
      if (error instanceof CallError && error.reason === "limited") this.#limited(began);
      return false;
    }
    this.#busy = batch.length >= BUSY_OPERATIONS;
    this.#queue.splice(0, batch.length);
    for (const entry of batch) {
      this.#bytes -= size(entry);
      entry.finished();
    }
    return true;
  }

  #operation({ key, value, notAfter = 0, issued = 0 }: Outgoing, now: number): BatchOperation | undefined {
    const { namespace } = this.#store;
    if (!value) return { operation: { $case: "remove", remove: { namespace, key, ttl: undefined } } };
    if (notAfter <= now) return undefined;
    const [ttl, issueTime] = [duration(notAfter - now), duration(issued)];
    return { operation: { $case: "put", put: { namespace, key, value, ttl, issueTime, pinned: false } } };
  }

  /** Counts the outcome of a Put or Remove that leaves the queue, and remembers a removal. */
  #conclude({ key, value, reason }: Outgoing, outcome: string): void {
    if (value) {
      this.#recorder.count("puts", outcome);
      return;
    }
    const [name, sent] = [nameOf(key), outcome === "stored"];
    this.#recorder.count("removals", sent ? (reason ?? "application") : outcome);
    this.#removing.delete(name);
    this.#removed.add(name);
    if (this.#removed.size > MOST_REMOVED) this.#removed.delete(this.#removed.values().next().value ?? "");
    if (sent) this.#failed.delete(name);
    else if (this.#failed.size < MOST_REMOVED) this.#failed.add(name);
  }
}

function nameOf(key: Buffer): string {
  return key.toString("latin1");
}

function size({ value }: Outgoing): number {
  return ENTRY_BYTES + (value?.length ?? 0);
}

/** Resolves as `promise` does, or to `otherwise` when `milliseconds` have passed. */
export async function within<Value>(promise: Promise<Value>, milliseconds: number, otherwise: Value): Promise<Value> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<Value>((resolve) => {
    timer = setTimeout(resolve, milliseconds, otherwise);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
