/** Makes calls while the breaker is open, so that no handshake waits to find out that the server is back. */
import type { Breaker } from "./breaker.js";
import { CallError, type Store } from "./store.js";

const PROBE_KEY = Buffer.from("resumed/v1 probe");

export class Prober {
  readonly #store: Store;
  readonly #deadline: number;
  readonly #breaker: Breaker;
  readonly #recovered: () => void;
  #timer: NodeJS.Timeout | undefined;
  #closed = false;

  /**
   * @param deadline Milliseconds of a handshake: a server that is slower than that stays excluded.
   * @param recovered Called when a probe has closed the breaker.
   */
  constructor(store: Store, deadline: number, breaker: Breaker, recovered: () => void) {
    this.#store = store;
    this.#deadline = deadline;
    this.#breaker = breaker;
    this.#recovered = recovered;
  }

  /** Probes from now on until the breaker is closed. */
  start(): void {
    if (this.#timer || this.#closed) return;
    this.#timer = setTimeout(() => void this.#run(), this.#breaker.nextProbePause()).unref();
  }

  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
  }

  async #run(): Promise<void> {
    if (this.#breaker.open) await this.#probe();
    this.#timer = undefined;
    if (this.#breaker.open) this.start();
  }

  async #probe(): Promise<void> {
    const began = performance.now();
    try {
      await this.#store.get(PROBE_KEY, this.#deadline);
      if (this.#breaker.succeed()) this.#recovered();
    } catch (error) {
      const limited = error instanceof CallError && error.reason === "limited";
      if (limited && this.#breaker.limit(began)) this.#recovered();
    }
  }
}
