{{/* Names and metadata. */}}

{{- define "resumed.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 46 | trimSuffix "-" -}}
{{- end -}}

{{/* The names of CronJobs have a suffix, and 52 characters at most. */}}
{{- define "resumed.fullname" -}}
{{- $name := include "resumed.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- .Values.fullnameOverride | default $full | trunc 46 | trimSuffix "-" -}}
{{- end -}}

{{- define "resumed.namespace" -}}
{{- .Values.namespaceOverride | default .Release.Namespace -}}
{{- end -}}

{{/* The labels that select the pods of a component. Arguments: root, component. */}}
{{- define "resumed.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "resumed.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "resumed.serverSelector" -}}
{{- include "resumed.selector" (list . "server") -}}
{{- end -}}

{{/* Metadata of an object. Arguments: root, and a dict with suffix, component, namespace, labels and annotations, all optional. */}}
{{- define "resumed.metadata" -}}
{{- $root := index . 0 -}}
{{- $given := index . 1 -}}
{{- $chart := dict
  "app.kubernetes.io/version" $root.Chart.AppVersion
  "app.kubernetes.io/managed-by" $root.Release.Service
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version)
-}}
{{- $selector := include "resumed.selector" (list $root ($given.component | default "server")) | fromYaml -}}
{{- $labels := merge $selector $chart ($given.labels | default dict | deepCopy) $root.Values.commonLabels -}}
{{- $metadata := dict
  "name" (printf "%s%s" (include "resumed.fullname" $root) ($given.suffix | default ""))
  "namespace" ($given.namespace | default (include "resumed.namespace" $root))
  "labels" $labels
-}}
{{- with merge ($given.annotations | default dict | deepCopy) $root.Values.commonAnnotations -}}
{{- $_ := set $metadata "annotations" . -}}
{{- end -}}
{{- toYaml $metadata -}}
{{- end -}}

{{/* Metadata of a component's pods. Arguments: root, component, labels, annotations. */}}
{{- define "resumed.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $selector := include "resumed.selector" (list $root (index . 1)) | fromYaml -}}
{{- $metadata := dict "labels" (merge $selector (deepCopy (index . 2)) $root.Values.commonLabels) -}}
{{- with merge (deepCopy (index . 3)) $root.Values.commonAnnotations -}}
{{- $_ := set $metadata "annotations" . -}}
{{- end -}}
{{- toYaml $metadata -}}
{{- end -}}

{{- define "resumed.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "resumed.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "resumed.tlsSecret" -}}
{{- .Values.tls.secret | default (printf "%s-tls" (include "resumed.fullname" .)) -}}
{{- end -}}

{{- define "resumed.operatorSecret" -}}
{{- .Values.operator.secret | default (printf "%s-operator-tls" (include "resumed.fullname" .)) -}}
{{- end -}}

{{- define "resumed.operatorIdentity" -}}
{{- $usual := printf "spiffe://%s/ns/%s/sa/%s-operator" .Values.clusterDomain (include "resumed.namespace" .) (include "resumed.fullname" .) -}}
{{- .Values.operator.identity | default $usual -}}
{{- end -}}

{{/* The name of the headless Service in DNS. */}}
{{- define "resumed.host" -}}
{{- printf "%s.%s.svc.%s" (include "resumed.fullname" .) (include "resumed.namespace" .) .Values.clusterDomain -}}
{{- end -}}

{{/* Quantities. */}}

{{/* Bytes of a size (64MiB) or of a quantity of Kubernetes (2Gi). */}}
{{- define "resumed.bytes" -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" . -}}
{{- $unit := trimPrefix $number . | trimSuffix "B" -}}
{{- $factors := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18
  "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976
-}}
{{- mulf (float64 $number) (float64 (get $factors $unit)) | printf "%.0f" -}}
{{- end -}}

{{/* Seconds of a duration, such as 90s or 1h30m. */}}
{{- define "resumed.seconds" -}}
{{- $seconds := 0.0 -}}
{{- range regexFindAll "[0-9.]+(ms|s|m|h|d)" . -1 -}}
{{- $unit := regexFind "[a-z]+" . -}}
{{- $factor := get (dict "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0) $unit -}}
{{- $seconds = addf $seconds (mulf (trimSuffix $unit . | float64) $factor) -}}
{{- end -}}
{{- printf "%.3f" $seconds -}}
{{- end -}}

{{/* Pods. */}}

{{- define "resumed.image" -}}
{{- .Values.image.repository -}}
{{- if .Values.image.digest -}}
@{{ .Values.image.digest }}
{{- else -}}
:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* A security context, without the ids that OpenShift chooses. Arguments: root, context. */}}
{{- define "resumed.securityContext" -}}
{{- $root := index . 0 -}}
{{- $adapt := $root.Values.global.compatibility.openshift.adaptSecurityContext -}}
{{- $openshift := and (eq $adapt "auto") ($root.Capabilities.APIVersions.Has "security.openshift.io/v1") -}}
{{- if or $openshift (eq $adapt "force") -}}
{{- omit (index . 1) "runAsUser" "runAsGroup" "fsGroup" | toYaml -}}
{{- else -}}
{{- index . 1 | toYaml -}}
{{- end -}}
{{- end -}}

{{/*
The spec of a pod that executes one command of `resumed`, with a volume of files that it reads.
Arguments: root, name, list of arguments, mount path, volume (empty for none), environment.
*/}}
{{- define "resumed.commandPod" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $volume := index . 4 -}}
restartPolicy: Never
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "resumed.securityContext" (list $root $root.Values.podSecurityContext) | nindent 2 }}
{{- range $field := list "imagePullSecrets" "nodeSelector" "tolerations" "priorityClassName" }}
{{- with get $root.Values $field }}
{{ dict $field . | toYaml }}
{{- end }}
{{- end }}
containers:
  - name: {{ $name }}
    image: {{ include "resumed.image" $root }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    args:
      {{- index . 2 | toYaml | nindent 6 }}
    {{- with index . 5 }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    resources:
      {{- $storage := dict "ephemeral-storage" "128Mi" }}
      {{- merge (deepCopy $root.Values.operator.resources) (dict "requests" $storage "limits" $storage) | toYaml | nindent 6 }}
    securityContext:
      {{- include "resumed.securityContext" (list $root $root.Values.securityContext) | nindent 6 }}
    {{- if $volume }}
    volumeMounts:
      - name: files
        mountPath: {{ index . 3 }}
        readOnly: true
volumes:
  - name: files
    {{- $volume | toYaml | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The spec of an operator's pod. Arguments: root, name, command, list of arguments after the target, environment. */}}
{{- define "resumed.operatorPod" -}}
{{- $root := index . 0 -}}
{{- $arguments := concat (list (index . 2) (printf "dns:///%s:7400" (include "resumed.host" $root))) (index . 3) -}}
{{- $volume := dict -}}
{{- if $root.Values.tls.enabled -}}
{{- $directory := "/etc/resumed/operator" -}}
{{- range $option, $file := dict "ca" "ca.crt" "cert" "tls.crt" "key" "tls.key" -}}
{{- $arguments = append $arguments (printf "--%s=%s/%s" $option $directory $file) -}}
{{- end -}}
{{- $volume = dict "secret" (dict "secretName" (include "resumed.operatorSecret" $root) "defaultMode" 0440) -}}
{{- end -}}
{{- include "resumed.commandPod" (list $root (index . 1) $arguments "/etc/resumed/operator" $volume (index . 4)) -}}
{{- end -}}

{{/* The file grants.toml: the values', and the operator's grants. */}}
{{- define "resumed.grants" -}}
{{- .Values.grants | trim -}}
{{- if .Values.operator.enabled }}

# The chart's operator.
[[grant]]
identity = {{ include "resumed.operatorIdentity" . | quote }}
namespaces = ["*"]
operations = ["purge", "stats"]

[[grant]]
identity = {{ include "resumed.operatorIdentity" . | quote }}
namespaces = ["resumed-check"]
operations = ["put", "get", "take", "remove", "watch"]
{{- end }}
{{- end -}}

{{/* The server's settings: names of environment variables, and values. */}}
{{- define "resumed.settings" -}}
{{- $listen := .Values.server.listen -}}
RESUMED_LISTEN: {{ printf "%s:7400" $listen | quote }}
RESUMED_HEALTH_LISTEN: {{ printf "%s:7401" $listen | quote }}
{{- if .Values.metrics.enabled }}
RESUMED_METRICS_LISTEN: {{ printf "%s:9464" $listen | quote }}
{{- end }}
{{- if eq .Values.engine "embedded" }}
RESUMED_STORAGE: lmdb:///var/lib/resumed
RESUMED_CAPACITY: {{ .Values.embedded.capacity | quote }}
{{- else }}
RESUMED_STORAGE: {{ .Values.redis.url | quote }}
{{- end }}
RESUMED_MAX_TTL: {{ .Values.server.maxTtl | quote }}
RESUMED_WORKERS: {{ .Values.server.workers | quote }}
RESUMED_THREADS: {{ .Values.server.threads | quote }}
RESUMED_SHUTDOWN_DELAY: {{ printf "%ds" (int .Values.server.shutdownDelaySeconds) | quote }}
RESUMED_MAX_CONNECTION_AGE: {{ .Values.server.maxConnectionAge | quote }}
RESUMED_MAX_CONNECTIONS: {{ int .Values.server.maxConnections | quote }}
RESUMED_NAMESPACE_OPS_PER_SECOND: {{ int .Values.namespaceLimits.opsPerSecond | quote }}
RESUMED_NAMESPACE_SESSIONS: {{ int .Values.namespaceLimits.sessions | quote }}
RESUMED_NAMESPACE_BYTES: {{ .Values.namespaceLimits.bytes | quote }}
RESUMED_NAMESPACE_WATCHERS: {{ int .Values.namespaceLimits.watchers | quote }}
RESUMED_LOG_LEVEL: {{ .Values.server.logLevel | quote }}
RESUMED_LOG_FORMAT: {{ .Values.server.logFormat | quote }}
{{- if .Values.tls.enabled }}
RESUMED_TLS_CERT: /etc/resumed/tls/tls.crt
RESUMED_TLS_KEY: /etc/resumed/tls/tls.key
RESUMED_CLIENT_CA: /etc/resumed/{{ if or .Values.tls.clientCA.secret .Values.tls.clientCA.configMap }}client-ca{{ else }}tls{{ end }}/ca.crt
{{- else }}
RESUMED_INSECURE: "true"
{{- end }}
{{- if .Values.grants }}
RESUMED_GRANTS: /etc/resumed/grants/grants.toml
{{- end }}
{{- if .Values.tracing.enabled }}
RESUMED_OTEL: "true"
{{- with .Values.tracing.endpoint }}
OTEL_EXPORTER_OTLP_ENDPOINT: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Names of volumes, their paths and sources. Directories are mounted, because a mounted file would not be updated. */}}
{{- define "resumed.volumes" -}}
{{- if .Values.tls.enabled }}
tls:
  path: /etc/resumed/tls
  volume: {secret: {secretName: {{ include "resumed.tlsSecret" . }}, defaultMode: 0440}}
{{- $items := printf "items: [{key: %s, path: ca.crt}]" .Values.tls.clientCA.key }}
{{- with .Values.tls.clientCA.secret }}
client-ca:
  path: /etc/resumed/client-ca
  volume: {secret: {secretName: {{ . }}, defaultMode: 0440, {{ $items }}}}
{{- end }}
{{- with .Values.tls.clientCA.configMap }}
client-ca:
  path: /etc/resumed/client-ca
  volume: {configMap: {name: {{ . }}, {{ $items }}}}
{{- end }}
{{- end }}
{{- if .Values.grants }}
grants:
  path: /etc/resumed/grants
  volume: {configMap: {name: {{ include "resumed.fullname" . }}}}
{{- end }}
{{- if and (eq .Values.engine "redis") .Values.redis.secret }}
redis:
  path: /etc/resumed/redis
  volume: {secret: {secretName: {{ .Values.redis.secret }}, defaultMode: 0440}}
{{- end }}
{{- if eq .Values.engine "embedded" }}
{{- if not .Values.persistence.enabled }}
sessions:
  path: /var/lib/resumed
  writable: true
  volume: {emptyDir: {sizeLimit: {{ .Values.persistence.size }}}}
{{- else if .Values.persistence.existingClaim }}
sessions:
  path: /var/lib/resumed
  writable: true
  volume: {persistentVolumeClaim: {claimName: {{ .Values.persistence.existingClaim }}}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Ports of Redis and its Sentinels: those in the URL, and those of the values. A list in JSON. */}}
{{- define "resumed.redisPorts" -}}
{{- $sentinel := contains "+sentinel:" .Values.redis.url -}}
{{- $ports := list -}}
{{- range regexFind "//[^/?]*" .Values.redis.url | trimPrefix "//" | splitList "@" | last | splitList "," -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" . | trimPrefix ":" | default (ternary "26379" "6379" $sentinel) | int) -}}
{{- end -}}
{{- if $sentinel -}}
{{- $ports = append $ports 6379 -}}
{{- end -}}
{{- range .Values.networkPolicy.redis.ports -}}
{{- $ports = append $ports (int .) -}}
{{- end -}}
{{- uniq $ports | toJson -}}
{{- end -}}

{{/* How an endpoint is scraped. Argument: the values of a monitor. */}}
{{- define "resumed.scrape" -}}
interval: {{ .interval | quote }}
honorLabels: {{ .honorLabels }}
{{- range $field := list "scrapeTimeout" "relabelings" "metricRelabelings" }}
{{- with get $ $field }}
{{ dict $field . | toYaml }}
{{- end }}
{{- end }}
{{- end -}}
