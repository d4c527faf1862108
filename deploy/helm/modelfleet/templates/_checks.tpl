{{/* Values that are each valid but do not go together. Every sentence says what is wrong and what to do. */}}
{{- define "modelfleet.checks" -}}
{{- $fullname := include "modelfleet.fullname" . -}}
{{- if gt (len $fullname) 36 -}}
{{- fail (printf "The name %q has %d characters, and pools add up to 27 to it. Set fullnameOverride to at most 36." $fullname (len $fullname)) -}}
{{- end -}}

{{- $manager := .Values.manager -}}
{{- $postgresql := eq $manager.database.kind "postgresql" -}}
{{- if and (gt (int $manager.replicas) 1) (not $postgresql) -}}
{{- fail (printf "manager.replicas is %d, but SQLite serves one. Set manager.database.kind=postgresql with existingSecret, or replicas=1." (int $manager.replicas)) -}}
{{- end -}}
{{- if and $postgresql (not $manager.database.existingSecret) -}}
{{- fail "manager.database.kind is postgresql without a URL. Set manager.database.existingSecret to the Secret that has it." -}}
{{- end -}}
{{- if and (eq $manager.blobs.kind "s3") (not $manager.blobs.url) -}}
{{- fail "manager.blobs.kind is s3 without a place. Set manager.blobs.url, such as s3://models/prod." -}}
{{- end -}}
{{- if and (gt (int $manager.replicas) 1) (eq $manager.blobs.kind "volume") (not (has "ReadWriteMany" $manager.persistence.accessModes)) -}}
{{- fail (printf "manager.replicas is %d, but their volume can be mounted on one node. Set manager.blobs.kind=s3, or manager.persistence.accessModes={ReadWriteMany}." (int $manager.replicas)) -}}
{{- end -}}

{{- with .Values.tokenizer.autoscaling -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- fail (printf "tokenizer.autoscaling.minReplicas is %d and maxReplicas %d. Set minReplicas to at most maxReplicas." (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}

{{- $caches := dict -}}
{{- range $name, $pool := include "modelfleet.pools" . | fromYaml -}}
{{- if not (regexMatch "^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$" $name) -}}
{{- fail (printf "The pool's name %q is not one: use up to 20 lower-case letters, digits and hyphens, with no hyphen at the ends." $name) -}}
{{- end -}}
{{- include "modelfleet.poolChecks" (dict "name" $name "pool" $pool) -}}
{{- include "modelfleet.scaleCheck" (dict "root" $ "name" $name "pool" $pool) -}}
{{- $where := get (dict "hostPath" $pool.cache.hostPath "persistentVolumeClaim" $pool.cache.existingClaim) $pool.cache.kind -}}
{{- if $where -}}
{{- $cache := printf "%s %s" $pool.cache.kind $where -}}
{{- with get $caches $cache -}}
{{- fail (printf "inference.pools.%s and inference.pools.%s both keep their cache in %s, which workers cannot share. Give each pool its own." . $name $cache) -}}
{{- end -}}
{{- $_ := set $caches $cache $name -}}
{{- end -}}
{{- end -}}

{{- $pools := keys (include "modelfleet.pools" . | fromYaml) | sortAlpha -}}
{{- range $model := .Values.models.initial -}}
{{- range .pools -}}
{{- if not (has . $pools) -}}
{{- fail (printf "models.initial: %s is to be served by the pool %s, which is not among inference.pools: %s." $model.name . (join ", " $pools)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.batch.enabled .Values.batch.pool (not (has .Values.batch.pool $pools)) -}}
{{- fail (printf "batch.pool is %s, which is not among inference.pools: %s." .Values.batch.pool (join ", " $pools)) -}}
{{- end -}}

{{- if and .Values.models.initial (not .Values.models.existingClaim) -}}
{{- range .Values.models.initial -}}
{{- if hasPrefix "/" .source -}}
{{- fail (printf "models.initial: %s comes from the folder %s, but nothing is mounted there. Set models.existingClaim to the claim that has it below /models." .name .source) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- with .Values.batch -}}
{{- if .enabled -}}
{{- if not (and .model .input .output) -}}
{{- fail "batch.enabled is true, but a batch needs all of batch.model, batch.input and batch.output. Set them." -}}
{{- end -}}
{{- if and (not .existingClaim) (not (and (hasPrefix "s3://" .input) (hasPrefix "s3://" .output))) -}}
{{- fail "batch.input or batch.output is a path, but nothing is mounted at /data. Set batch.existingClaim, or use s3:// URLs." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Takes name, pool. */}}
{{- define "modelfleet.poolChecks" -}}
{{- $where := printf "inference.pools.%s" .name -}}
{{- with .pool -}}
{{- $gpus := int .gpu.count -}}
{{- if and (ne .device "cpu") (eq $gpus 0) -}}
{{- fail (printf "%s runs on %s but asks for no GPU. Set its gpu.count to 1, or its device to cpu." $where .device) -}}
{{- end -}}
{{- if and (eq .device "cpu") (gt $gpus 0) -}}
{{- fail (printf "%s runs on the CPU but asks for %d of %s, which would stand idle. Set its gpu.count to 0, or its device to cuda." $where $gpus .gpu.resource) -}}
{{- end -}}
{{- if and (eq .device "tensorrt") (not (or .image.repository .image.tag .image.digest)) -}}
{{- fail (printf "%s runs on tensorrt, which the gpu image lacks. Set its image.repository or image.tag to an image with TensorRT's libraries, or its device to cuda." $where) -}}
{{- end -}}
{{- if and (eq .cache.kind "persistentVolumeClaim") (not .cache.existingClaim) -}}
{{- fail (printf "%s keeps its cache in a claim without a name. Set its cache.existingClaim." $where) -}}
{{- end -}}
{{- if and (eq .cache.kind "hostPath") (not (hasPrefix "/" .cache.hostPath)) -}}
{{- fail (printf "%s keeps its cache on the node, but its cache.hostPath is %q. Set it to an absolute path." $where .cache.hostPath) -}}
{{- end -}}
{{- $surge := ne (toString .rollout.maxSurge) "0" -}}
{{- if and (eq .cache.kind "persistentVolumeClaim") (or $surge .autoscaling.enabled (not .manageReplicas) (gt (int .replicas) 1)) -}}
{{- fail (printf "%s has several workers, if only in a rollout, and one claim as cache, which they cannot share. Set its cache.kind to ephemeral or emptyDir, or replicas to 1 and rollout.maxSurge to 0." $where) -}}
{{- end -}}
{{- if and (eq .cache.kind "hostPath") $surge (eq (toString .rollout.maxUnavailable) "0") -}}
{{- fail (printf "%s keeps its cache on the node, and its rollouts may find no node for a second worker. Set its rollout.maxUnavailable to 1." $where) -}}
{{- end -}}
{{- if and (eq (toString .rollout.maxSurge) "0") (eq (toString .rollout.maxUnavailable) "0") -}}
{{- fail (printf "%s has rollout.maxSurge 0 and rollout.maxUnavailable 0, so that no rollout could move. Raise one." $where) -}}
{{- end -}}
{{- with .autoscaling -}}
{{- if .enabled -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "%s has autoscaling.minReplicas %d and maxReplicas %d. Set minReplicas to at most maxReplicas." $where (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if and (eq .kind "keda") (not .prometheusURL) -}}
{{- fail (printf "%s scales by KEDA, which reads the queues from Prometheus. Set its autoscaling.prometheusURL." $where) -}}
{{- end -}}
{{- if and (eq (int .minReplicas) 0) (ne .kind "keda") -}}
{{- fail (printf "%s has autoscaling.minReplicas 0, but an HPA never wakes a pool. Set it to 1, or autoscaling.kind to keda." $where) -}}
{{- end -}}
{{- if and (eq (int .minReplicas) 0) (not .activationQuery) -}}
{{- fail (printf "%s has autoscaling.minReplicas 0, but with no worker there is no queue that could wake it. Set autoscaling.activationQuery, or minReplicas to 1." $where) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
A number of workers that ScalePool has set belongs to the manager: an upgrade that sets another ends half-way in a
conflict. Seen only where there is a cluster to look at. Takes root, name, pool.
*/}}
{{- define "modelfleet.scaleCheck" -}}
{{- if and .pool.manageReplicas (not .pool.autoscaling.enabled) -}}
{{- $deployment := printf "%s-pool-%s" (include "modelfleet.fullname" .root) .name -}}
{{- with lookup "apps/v1" "Deployment" .root.Release.Namespace $deployment -}}
{{- $live := int .spec.replicas -}}
{{- range .metadata.managedFields -}}
{{- if and (eq .manager "modelfleet-manager") (ne $live (int $.pool.replicas)) -}}
{{- fail (printf "inference.pools.%s has %d workers by `modelfleet pools scale`, and the release sets %d. Run `modelfleet pools scale %s %d` first, or set its manageReplicas to false." $.name $live (int $.pool.replicas) $.name (int $.pool.replicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
