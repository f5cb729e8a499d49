/** Files that are read again when they change: keyrings, credentials. */
import { statSync } from "node:fs";

import { ResumedError } from "./errors.js";

const CHECK_MILLISECONDS = 1000;

/** What is told of events worth a human's time: `console` is one. */
export interface Logger {
  info(message: string): void;
  warn(message: string): void;
  error(message: string): void;
}

/**
 * Files that belong together. What has changed is read once it looks the same twice in a row, or was last written a second ago, so
 * that nobody reads the middle of a change. What cannot be used is reported once, and what was read before stays.
 */
export class Files {
  readonly paths: readonly string[];
  readonly #what: string;
  readonly #logger: Logger;
  #seen: string;
  #taken: string;
  #complaint = "";
  #nextCheck = performance.now() + CHECK_MILLISECONDS;

  /**
   * Looks at the files, which are to be read after that.
   *
   * @param what They are, for the log.
   * @throws {ResumedError} There is none.
   */
  constructor(what: string, paths: readonly string[], logger: Logger) {
    this.paths = paths;
    this.#what = what;
    this.#logger = logger;
    this.#seen = this.#taken = this.#look();
  }

  /** Looks once a second at most, and calls `read` when the files have changed and settled; it returns what goes to the log. */
  follow(read: () => string): void {
    if (performance.now() < this.#nextCheck) return;
    this.#nextCheck = performance.now() + CHECK_MILLISECONDS;
    try {
      const [before, seen] = [this.#seen, this.#look()];
      this.#seen = seen;
      if (seen !== this.#taken) {
        if (seen !== before && this.paths.some(isRecent)) return;
        const news = read();
        this.#taken = seen;
        this.#logger.info(`resumed: ${this.#what} read again${news && `: ${news}`}`);
      }
      this.#complaint = "";
    } catch (error) {
      const complaint = String(error);
      if (complaint !== this.#complaint) {
        // once, not every second
        this.#logger.error(`resumed: ${this.#what} not read again, what was read before stays: ${complaint}`);
      }
      this.#complaint = complaint;
    }
  }

  #look(): string {
    return this.paths.map((path) => this.#versionOf(path)).join();
  }

  #versionOf(path: string): string {
    try {
      const { ino, size, mtimeNs } = statSync(path, { bigint: true });
      return [ino, size, mtimeNs].join(" ");
    } catch (error) {
      throw new ResumedError(`${this.#what} ${path}: ${codeOf(error)}`);
    }
  }
}

function isRecent(path: string): boolean {
  return Date.now() - statSync(path).mtimeMs < CHECK_MILLISECONDS;
}

/** What went wrong with a file, in a word. */
export function codeOf(error: unknown): string {
  return (error as NodeJS.ErrnoException).code ?? String(error);
}
